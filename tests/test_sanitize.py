"""The sanitizer's runs: ops that pass our mode by are seen by others, and what is found is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import sanitize  # noqa: E402
from facts import found_before  # noqa: E402

from torchlms.eager import backward_thread, private  # noqa: E402
from torchlms.eager.install import WatchMode  # noqa: E402


class Looking(TorchDispatchMode):
    """What torch's sanitizer is: a mode below ours."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the process that is watched; undone after the test."""
    monkeypatch.setattr(private, "unwatched", private.unwatched)
    monkeypatch.setattr(backward_thread, "_as_backward", backward_thread._as_backward)
    monkeypatch.setattr(WatchMode, "__torch_dispatch__", WatchMode.__torch_dispatch__)
    sanitize.show_all_ops()


def test_another_mode_sees_what_passes_ours_by(shown: None) -> None:
    with Looking() as looking:
        with private.unwatched():
            torch.zeros(3)
        assert looking.ops == ["aten.zeros.default"]


def test_it_sees_what_is_done_as_backward_would(shown: None) -> None:
    with Looking() as looking:
        made = backward_thread._as_backward(torch.device("cpu"), lambda: torch.zeros(3))
    assert made.tolist() == [0.0] * 3
    assert "aten.zeros.default" in looking.ops


@pytest.mark.parametrize("name", ["host", "ladder", "verify"])
def test_a_path_runs_the_same_when_it_is_looked_at(name: str, shown: None) -> None:
    """On the CPU the slow tier is a file, and budgets are those of a small network."""
    path = sanitize.PATHS[name]
    rules = {"min_bytes": 512, "recompute": False}
    small = sanitize.Journey(path.figure, {**path.options, "budget": 700_000, "rules": rules})
    with Looking() as looking:
        took = sanitize.run_path(small, "cpu", width=32, batch=256)
    assert took[path.figure] > 0
    assert looking.ops.count("aten.addmm.default") > 8
    assert sanitize._Passing.depth == 0


@pytest.mark.parametrize(
    ("code", "out", "clean", "why"),
    [
        (0, '{"bytes_out_per_step": 5}', True, ""),
        (0, '{"bytes_out_per_step": 0}', False, "no value took this way: bytes_out_per_step is 0"),
        (1, "", False, "exit code 1"),
    ],
)
def test_what_is_found_is_told(
    code: int, out: str, clean: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], code, stdout=out, stderr=f"race in {ROOT}/src/x.py")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    found = sanitize.finding(sanitize.Tool("a tool"), "host", 1.0)
    assert (found["clean"], found["why"]) == (clean, why)
    assert str(ROOT) not in json.dumps(found)
    assert bool(found["said"]) is not clean


def test_what_was_found_before_is_kept_for_the_same_device_torch_and_code(tmp_path: Path) -> None:
    head = {"device_name": "a card", "torch": "2.13", "code": "abc"}
    path = tmp_path / "found.json"
    assert found_before(path, head) == {}
    path.write_text(json.dumps({**head, "findings": [1]}))
    assert found_before(path, head)["findings"] == [1]
    for name in head:
        assert found_before(path, {**head, name: "another"}) == {}
