"""A few faults of each kind; `python -m tests.faults` injects as many as one likes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.campaign import tally
from faults.every_op import phases_of_ops, strike_every
from faults.injection import KINDS, Fault
from faults.trial import moments, try_fault

SEED = 20


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    ("snapshot", "recompute"),
    [pytest.param(False, True, marks=pytest.mark.slow), (True, False)],
)
def test_a_fault_at_any_moment(kind: str, snapshot: bool, recompute: bool, spill_dir: Path) -> None:
    count = moments(kind, recompute=recompute, spill_dir=spill_dir)
    draw = random.Random(f"{SEED} {kind} {snapshot}")
    fault = Fault(kind, draw.randrange(max(1, count)))
    found = try_fault(fault, spill_dir, snapshot=snapshot, recompute=recompute)
    assert found.wrong == (), found


@pytest.mark.parametrize("count", [3, pytest.param(12, marks=pytest.mark.more)])
def test_a_torn_step_is_undone_where_that_was_asked_for(count: int, spill_dir: Path) -> None:
    """Out of memory in the last op of the last step: in the middle of a fused update of many tensors."""
    kind = "out of memory in an op"
    last = moments(kind, recompute=False, spill_dir=spill_dir)
    told = {}
    for snapshot in (True, False):
        for moment in range(last - count, last):
            found = try_fault(Fault(kind, moment), spill_dir, snapshot=snapshot, recompute=False)
            assert found.wrong == ()
            told.setdefault(snapshot, []).append(found.errors)
    assert told[True] == told[False]
    assert ("StepTorn",) in told[True]


STRIDE = 45  # of the ops of two steps; `python -m tests.faults --every-op` leaves none out


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ops_of_every_phase_may_run_out_of_memory(recompute: bool, spill_dir: Path) -> None:
    struck = list(strike_every(STRIDE, spill_dir, snapshot=not recompute, recompute=recompute, first=7))
    assert [one.found for one in struck if one.found.wrong] == []
    assert set(tally(struck)) == {"forward", "backward", "optimizer"}


def test_the_ops_of_a_run_are_the_same_every_time(spill_dir: Path) -> None:
    """Or else the phases that are told would not be those of the ops that are struck."""
    once = phases_of_ops.__wrapped__(spill_dir, snapshot=True, recompute=False)
    assert phases_of_ops.__wrapped__(spill_dir, snapshot=True, recompute=False) == once
