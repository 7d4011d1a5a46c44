"""``import torchlms`` is cheap and quiet: nothing optional is loaded, no device is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "torchlms"
OPTIONAL = ["typer", "rich", "keras", "lightning", "transformers", "torchvision", "scipy", "hypothesis"]
OTHER_NAMES = ["Rules", "api", "disable", "enable"]
LIMIT = 0.25  # of what `import torch` takes, which is more than a second

CHILD = """
import json, sys, threading, time
start = time.process_time()
import torch
torch_seconds = time.process_time() - start
modules, threads = set(sys.modules), threading.active_count()
start = time.process_time()
import torchlms
torchlms.LMS  # comes with all that is needed to use it
seconds = time.process_time() - start
print(json.dumps({
    "share": seconds / torch_seconds,
    "modules": sorted(set(sys.modules) - modules),
    "cuda": torch.cuda.is_initialized(),
    "threads": threading.active_count() - threads,
}))
"""


def import_in_child() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result: dict[str, Any] = json.loads(done.stdout)
    return result


first_import = cache(import_in_child)

pytestmark = pytest.mark.skipif(not (PACKAGE / "__init__.py").exists(), reason="no torchlms/__init__.py yet")


def test_nothing_optional_and_no_device() -> None:
    seen = first_import()
    loaded = {name.split(".")[0] for name in seen["modules"]}
    assert not loaded.intersection(OPTIONAL)
    assert not seen["cuda"]
    assert seen["threads"] == 0


def test_costs_little_above_torch() -> None:
    # The best of up to six: a machine that is busy just now makes an import slower, never faster.
    shares = [first_import()["share"]]
    while len(shares) < 6 and min(shares) > LIMIT:
        shares.append(import_in_child()["share"])
    assert min(shares) <= LIMIT, shares


def test_torch_is_left_for_later() -> None:
    """What only asks for the version, an error or the command line does not wait for torch."""
    child = "import sys, torchlms.cli; torchlms.LMSError; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "name",
    ["LMS", "nonsense", *(pytest.param(name, marks=pytest.mark.more) for name in OTHER_NAMES)],
)
def test_each_name_can_be_the_first_asked_for(name: str) -> None:
    child = f"import torchlms; print(torchlms.{name}.__name__); from torchlms import *; print(LMS)"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=120)
    if name == "nonsense":
        assert "module 'torchlms' has no attribute 'nonsense'" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
