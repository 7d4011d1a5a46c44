"""What every test gets: one seed, a cache of its own, and a check that it leaves nothing behind.

The check runs after each test and names what was left: threads, saved-tensor hooks, dispatch modes, global
module and optimizer hooks, the device's memory fraction, pinned host bytes, spill directories. What can be
taken away again is taken away, so that one leak fails one test and not all that follow.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import forked, long

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FROZEN = 1_000_000_000  # objects, more than a test makes
count_frozen = gc.get_freeze_count
GRACE_S = 2.0  # how long a thread or a copy in flight may take to end after its test

# The user's own cache (machine rates, spill files) is neither read nor written, also not by child processes.
CACHE = Path(tempfile.mkdtemp(prefix="lms-tests-"))
os.environ["TORCHLMS_CACHE"] = str(CACHE)
# Asking for a GPU must not poison a later fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    # Time limits per example measure the machine, not the code; CI draws the same examples every time.
    settings.register_profile("torchlms", deadline=None, derandomize=bool(os.environ.get("CI")))
    settings.load_profile("torchlms")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", default="1/1", metavar="K/N", help="One of N parts of the tests: the same each time."
    )


def pytest_report_header() -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {device}"]


# Files that take long, or whose tests do: with a whole file for each worker, whoever gets one last ends last.
FIRST = (
    "matrix/test_matrix.py", "runner/test_training.py", "runner/test_out_of_memory.py", "test_collector.py",
    "test_suites.py", "test_soak.py", "bench/test_runner.py", "eager/test_recompute.py",
    "eager/test_loops.py", "test_lean_import.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m` is applied
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    listed = long.listed()
    gone = listed.difference(item.nodeid for item in items)
    if gone and config.args == config.getini("testpaths"):
        raise pytest.UsageError(f"{long.LIST.name} lists what is no test any more: {', '.join(sorted(gone))}")
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.long)
    part, parts = map(int, config.getoption("--part").split("/"))
    others = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts != part % parts]
    if others:
        config.hook.pytest_deselected(items=others)
        left_out = set(others)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: not item.nodeid.partition("::")[0].endswith(FIRST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_unconfigure() -> None:
    forked.end()
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """One thread for these tiny steps, here and in child processes: more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def spared_collector() -> Iterator[None]:
    """Collections pass by what is imported: each LMS begins with one, a tenth of a second for nothing.

    LMS then leaves the collector alone. That it sees to this itself is tried in test_collector.py.
    """
    importlib.import_module("torch._dynamo")  # as the first optimizer does
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "get_freeze_count", lambda: FROZEN)  # to count them takes as long as to collect
        yield


@pytest.fixture
def unfrozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The collector as a program has it that does not see to it: all objects are looked at."""
    monkeypatch.setattr(gc, "get_freeze_count", count_frozen)
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def settable_flags() -> None:
    """torch's own test helpers, once imported, forbid to set the flags of cuDNN for the whole process."""
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True


@pytest.fixture
def spill_dir(tmp_path: Path) -> Path:
    """An empty directory for ``disk_dir=``; the leak check looks into it."""
    path = tmp_path / "spill"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    places = [CACHE, Path(tempfile.gettempdir())]
    if "tmp_path" in request.fixturenames:
        places.append(request.getfixturevalue("tmp_path"))
    on_gpu = request.node.get_closest_marker("gpu") is not None and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.init()  # its settings can be compared only from here on
    before = _watch(places)
    yield
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()  # what this test cached must not starve the next one's convolutions
    found = _leaks(before, places)
    deadline = time.monotonic() + GRACE_S
    while found and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
        found = _leaks(before, places)
    if found:
        _clean_up(before, places)
        pytest.fail("left behind by this test: " + "; ".join(found), pytrace=False)


# What is watched: a name, and a function that lists what is there now. What is there after a test and was
# not there before it is a leak. Private names of torch are asked for with care, for they differ by version.


def _watch(places: list[Path]) -> dict[str, list[Any]]:
    return {
        "thread": _threads(),
        "saved-tensor hooks": _saved_tensor_hooks(),
        "dispatch mode": _dispatch_modes(),
        "function mode": _function_modes(),
        "global hook": _global_hooks(),
        "torch setting": _settings(),
        "pinned bytes": _pinned(),
        "spill directory": _spill_directories(places),
    }


def _leaks(before: dict[str, list[Any]], places: list[Path]) -> list[str]:
    after = _watch(places)
    found = [f"{what} {item}" for what in after for item in after[what] if item not in before[what]]
    if after["pinned bytes"] < before["pinned bytes"]:  # fewer than before is no leak
        found = [text for text in found if not text.startswith("pinned bytes")]
    return found


def _threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if not t.daemon or t.name.startswith("torchlms")]


def _saved_tensor_hooks() -> list[Any]:
    top = _private(torch, "_C", "_autograd", "_top_saved_tensors_default_hooks")
    try:
        hooks = top(False) if top else None
    except TypeError:  # another signature in another version
        return []
    return [hooks] if hooks else []


def _dispatch_modes() -> list[Any]:
    stack = _private(torch, "utils", "_python_dispatch", "_get_current_dispatch_mode_stack")
    return list(stack()) if stack else []


def _function_modes() -> list[Any]:
    stack = _private(torch, "overrides", "_get_current_function_mode_stack")
    return list(stack()) if stack else []


def _global_hooks() -> list[str]:
    found = []
    for module in ("torch.nn.modules.module", "torch.optim.optimizer"):
        for name, hooks in vars(sys.modules[module]).items() if module in sys.modules else ():
            if name.startswith("_global_") and name.endswith("hooks") and isinstance(hooks, dict):
                found += [f"{name}[{key}]" for key in hooks]
    return found


def _settings() -> list[str]:
    found = [
        f"grad mode {torch.is_grad_enabled()}",
        f"default dtype {torch.get_default_dtype()}",
        f"deterministic algorithms {torch.are_deterministic_algorithms_enabled()}",
        f"cudnn.benchmark {torch.backends.cudnn.benchmark}",
        f"cudnn.deterministic {torch.backends.cudnn.deterministic}",
    ]
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    if fraction is not None and torch.cuda.is_initialized():
        found += [f"memory fraction {i}: {fraction(i)}" for i in range(torch.cuda.device_count())]
    return found


def _pinned() -> list[int]:
    arena = sys.modules.get("torchlms.memory.arena")  # a test that did not load it pinned nothing
    in_use: Callable[[], int] | None = getattr(arena, "pinned_bytes_in_use", None)
    n_bytes = in_use() if in_use else 0
    return [n_bytes] if n_bytes else []


def _spill_directories(places: list[Path]) -> list[Path]:
    pattern = f"torchlms-{os.getpid()}-*"
    system = Path(tempfile.gettempdir())
    return [
        path
        for place in places
        for path in (place.glob(pattern) if place == system else place.rglob(pattern))
        if path.is_dir()
    ]


def _clean_up(before: dict[str, list[Any]], places: list[Path]) -> None:
    """Take away what can be taken away; threads, pinned bytes and other settings stay as they are."""
    torch.set_grad_enabled(f"grad mode {True}" in before["torch setting"])
    pop = _private(torch, "_C", "_autograd", "_pop_saved_tensors_default_hooks")
    for _ in range(100):
        hooks = _saved_tensor_hooks()
        if pop is None or all(h in before["saved-tensor hooks"] for h in hooks):
            break
        pop()
    for mode in reversed([m for m in _dispatch_modes() if m not in before["dispatch mode"]]):
        mode.__exit__(None, None, None)
    for path in _spill_directories(places):
        if path not in before["spill directory"]:
            shutil.rmtree(path, ignore_errors=True)


def _private(owner: Any, *names: str) -> Any:
    for name in names:
        owner = getattr(owner, name, None)
    return owner
