"""Commands of the Makefile that would install another torch, and so are only read, by `make -n`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a make that runs these tests tells the makes below it.
INHERITED = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PY", "VENV", "TORCH", "PYTHON")

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / "Makefile").exists(), reason="no make, or no Makefile"
)


def planned(*words: str) -> str:
    command = ["make", "--no-print-directory", "-n", *words]
    alone = {name: value for name, value in os.environ.items() if name not in INHERITED}
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0"])
def test_another_torch_gets_an_environment_of_its_own(version: str) -> None:
    said = planned("test-torch", f"TORCH=torch=={version}")
    folder = f"build/venv-torch--{version}"
    assert f"{folder}/bin/python -m pip install --no-compile 'torch=={version}'" in said
    assert said.index("pip install --no-compile 'torch") < said.index("--editable"), (
        "before others ask for a torch"
    )
    assert f"{folder}/bin/python -m pytest" in said
    assert " .venv" not in said


def test_trainers_take_no_second_torch(tmp_path: Path) -> None:
    said = planned("trainers", "PY=python3", f"TRAINERS_VENV={tmp_path / 'trainers'}")
    assert "borrowed.pth" in said
    assert said.index("borrowed.pth") < said.index('"torch==$(')
    assert f"{tmp_path / 'trainers'}/bin/python -m pytest" in said
