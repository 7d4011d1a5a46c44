"""The CPU as the device, as in tests/eager, or `--device cuda`; `--write-loops`: docs/loops.md is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.eager.conftest import know_machine
from tests.eager.known_times import know_times
from tests.matrix import table

pytest.register_assert_rewrite("tests.matrix.trial", "tests.matrix.on_device")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the loops run")
    parser.addoption("--write-loops", action="store_true", help=f"write {table.FILE.name} from this run")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the loops run. (The options are unknown where this file is read too late to add them.)"""
    asked = str(request.config.getoption("--device", default="cpu"))
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if asked == "cuda":
        torch.cuda.init()  # its settings can be compared only from here on
    return asked


@pytest.fixture(autouse=True)
def machine(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rates and times everywhere; those of a device are measured, once."""
    if device == "cpu":
        know_machine(monkeypatch)
        know_times(monkeypatch)


@pytest.fixture(autouse=True)
def repeatable(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a device torch takes kernels that repeat their bits where it has some."""
    if device == "cpu":
        yield
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], str] | None]:
    """What the table is to say by row and way, or None when it is only compared with what it says."""
    if not request.config.getoption("--write-loops", default=False):
        yield None
        return
    cells: dict[tuple[str, str], str] = {}
    yield cells
    table.FILE.write_text(table.written(cells))
