"""Rates that explain a measured time, on tapes for which they are known."""

from __future__ import annotations

import pytest
from tapes import gpu
from test_drops import LOTS, RULES, blocks

from torchlms.core import joint, planner
from torchlms.core.calibrate import FASTEST, SLOWEST, explaining_factor, lap_s, scaled
from torchlms.core.curve import baseline_curve
from torchlms.core.drops import with_drops
from torchlms.core.plan import Budget, Choice
from torchlms.core.simulate import Simulator


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0, 1.5])
def test_the_factor_is_found_again(factor: float, recompute: bool) -> None:
    tape, machine = blocks(10), gpu(link=4e9)
    budget = Budget(int(0.4 * baseline_curve(tape).max()), LOTS, 0)
    plan = (joint if recompute else planner).plan(tape, machine, budget, RULES)
    drops = [tape.values[move.value] for move in plan.moves if move.choice is Choice.RECOMPUTE]
    moves = [move for move in plan.moves if move.choice is Choice.HOST]
    assert moves
    assert bool(drops) is recompute
    measured = Simulator(with_drops(tape, drops), scaled(machine, factor)).run(moves).step_s
    assert explaining_factor(tape, machine, plan, lap_s(tape, measured)) == pytest.approx(factor, rel=0.01)


def test_it_is_not_carried_too_far() -> None:
    tape, machine = blocks(10), gpu(link=4e9)
    plan = planner.plan(tape, machine, Budget(int(0.4 * baseline_curve(tape).max()), LOTS, 0), RULES)
    assert explaining_factor(tape, machine, plan, 1e9) == pytest.approx(SLOWEST, rel=0.01)
    assert explaining_factor(tape, machine, plan, 0.0) == pytest.approx(FASTEST, rel=0.01)


def test_a_plan_that_copies_nothing_says_nothing_about_copies() -> None:
    tape, machine = blocks(4), gpu()
    plan = planner.plan(tape, machine, Budget(LOTS, LOTS, 0), RULES)
    assert explaining_factor(tape, machine, plan, 123.0) == 1.0
