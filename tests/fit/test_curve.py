"""Step time against budget: never rising, ends that mean something, and nothing below the bound."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from tapes import MIB, chain, cpu, gpu, resnet

from tests.fit.batches import AMPLE, recorded, step
from torchlms.core.curve import peak_bytes, smallest_budget
from torchlms.core.machine import Machine
from torchlms.core.plan import Budget
from torchlms.core.rules import Rules
from torchlms.core.tape import Tape
from torchlms.fit.curve import POINTS, curve, default_budgets
from torchlms.fit.outlook import Verdict, look

DISK = replace(AMPLE, disk_bytes=AMPLE.host_bytes)


@pytest.mark.parametrize(
    ("tape", "machine"), [(chain(8), gpu()), (resnet(4), gpu(link=12e9)), (step(16), cpu())]
)
def test_a_curve(tape: Tape, machine: Machine) -> None:
    points = curve(tape, machine, DISK)
    assert len(points) == POINTS
    assert points[0].budget_bytes == smallest_budget(tape)
    assert points[-1].speed == 1
    assert points[-1].bytes_out == 0
    assert points[0].speed < 1
    for before, after in pairwise(points):
        assert before.budget_bytes < after.budget_bytes
        assert before.step_s >= after.step_s
    for point in points:
        assert point.lower_bound_s <= point.step_s * (1 + 1e-9)
        assert point.peak_device_bytes <= point.budget_bytes


def test_making_values_again_costs_speed() -> None:
    tape = recorded("transformer", 8).tape
    budget = Budget((smallest_budget(tape) + peak_bytes(tape)) // 2, host_bytes=0, disk_bytes=0)
    found = look(tape, gpu(), budget, Rules(min_bytes=0, recompute=True))
    assert found.predicted is not None
    assert found.predicted.bytes_out == 0
    assert found.predicted.compute_s > found.plain_s
    assert found.speed == pytest.approx(found.plain_s / found.predicted.step_s)
    assert found.speed < 1


def test_budgets_that_do_not_work_have_no_point() -> None:
    tape = chain(8)
    low, high = smallest_budget(tape), 2 * peak_bytes(tape)
    points = curve(tape, gpu(), DISK, [low // 2, high, low])
    assert [point.budget_bytes for point in points] == [low, high]


def test_without_room_elsewhere_only_the_top_is_left() -> None:
    points = curve(chain(8), gpu(), Budget(0, host_bytes=MIB, disk_bytes=0))
    assert [point.speed for point in points] == [1]


def test_a_tape_that_cannot_shrink_has_one_budget() -> None:
    tape = chain(8)
    stiff = replace(tape, values=tuple(replace(value, movable=False) for value in tape.values))
    assert len(default_budgets(stiff, cpu())) == 1


def test_the_headroom_is_given_up_before_the_step_is() -> None:
    """At the smallest budget nothing is left to holes; that is slower than promised, and works."""
    tape = chain(8)
    low = smallest_budget(tape)
    assert look(tape, gpu(), replace(DISK, device_bytes=low)).works
    below = look(tape, gpu(), replace(DISK, device_bytes=low - 1))
    assert (below.verdict, below.smallest_bytes, below.speed) == (Verdict.TOO_SMALL, low, 0)
    assert below.narrow.name in {op.name for op in tape.ops}
