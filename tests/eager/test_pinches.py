"""Whole programs on a model of the allocator: steps end up without remapping, and not by chance."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
from pages import MIB, Run
from sessions import more

from torchlms.core.headroom import Elbow
from torchlms.core.plan import Budget, Plan
from torchlms.core.planner import plan
from torchlms.core.simulate import baseline_curve
from torchlms.core.tape import Tape
from torchlms.eager.holes import Holes

sys.path.append(str(Path(__file__).parents[1] / "core"))
from tapes import gpu, resnet, transformer, unet

LOTS = 1 << 50
STEPS = 20
CASES = {
    "resnet": (resnet(12, scale=4.0), 0.5),
    "unet": (unet(), 0.7),
    "transformer": (transformer(12, unit_bytes=128 * MIB), 0.5),
}


@cache
def planned(name: str) -> tuple[Tape, Plan]:
    tape, share = CASES[name]
    budget_bytes = int(share * int(baseline_curve(tape).max()))
    made = plan(
        tape,
        gpu(),
        Budget(budget_bytes, LOTS, 0),
        headroom_bytes=int(0.02 * budget_bytes),
        elbow=Elbow(flying=0.2),
        copies=1.0,
    )
    assert made.moves
    return tape, made


def run_of(name: str, monkeypatch: pytest.MonkeyPatch, *, share: float = 1.0) -> Run:
    """Under a cap of ``share`` of what the plan was made for."""
    tape, made = planned(name)
    return Run(tape, made, int(share * made.budget.device_bytes) // MIB, monkeypatch)


@pytest.mark.parametrize("name", [more(name) if name == "resnet" else name for name in CASES])
def test_steps_become_calm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(name, monkeypatch)
    remaps = [run.step() for _ in range(STEPS)]
    assert remaps[-3:] == [0, 0, 0], remaps
    failures = run.pages.failures
    run.step()
    assert run.pages.failures == failures


def test_two_lessons_do_where_no_hole_can_be_opened_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Putting memory in order before every step would bring the same remaps back for six of them."""
    run = run_of("transformer", monkeypatch, share=0.96)
    remaps = [run.step() for _ in range(6)]
    assert remaps[0] > 0
    assert remaps[1] > 0
    assert remaps[2:] == [0, 0, 0, 0], remaps


@pytest.mark.more
def test_without_opening_holes_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holes, "open", lambda self, sizes: None)
    monkeypatch.setattr(Holes, "tuck", lambda self, sizes: None)
    runs = (run_of(name, monkeypatch) for name in CASES)
    assert any([run.step() for _ in range(STEPS)][-1] > 0 for run in runs)
