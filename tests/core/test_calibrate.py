"""Rates that explain a measured time, on tapes for which they are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tapes import gpu
from test_drops import LOTS, RULES, blocks

from torchlms.core import joint, planner
from torchlms.core.again import with_drops
from torchlms.core.calibrate import (
    LEAST,
    MOST,
    Rates,
    explanation,
    foretold,
    heat,
    stretched,
)
from torchlms.core.curve import baseline_curve
from torchlms.core.drops import Drops
from torchlms.core.pace import Load, Pace, lap_s
from torchlms.core.plan import Budget, Choice
from torchlms.core.simulate import Simulator
from torchlms.core.tape import Phase


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0, 1.5])
def test_the_factor_is_found_again(factor: float, recompute: bool) -> None:
    tape, machine = blocks(10), gpu(link=4e9)
    budget = Budget(int(0.4 * baseline_curve(tape).max()), LOTS, 0)
    plan = (joint if recompute else planner).plan(tape, machine, budget, RULES)
    drops = Drops.of(tape, plan.moves)
    moves = [move for move in plan.moves if move.choice is Choice.HOST]
    assert moves
    assert bool(drops.values) is recompute
    measured = Simulator(with_drops(tape, drops), machine.with_copies(factor)).run(moves).step_s
    found = explanation(tape, machine, plan, lap_s(tape, measured))
    assert found.copies == pytest.approx(factor, rel=0.01)
    assert found.ops == 1.0
    assert foretold(tape, machine, plan, found).step_s == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_what_copies_do_not_explain_is_said_of_ops(factor: float) -> None:
    tape, machine = blocks(4), gpu()
    plan = planner.plan(tape, machine, Budget(LOTS, LOTS, 0), RULES)
    measured = Simulator(stretched(tape, factor), machine).run([]).step_s
    found = explanation(tape, machine, plan, lap_s(tape, measured))
    assert found.ops == pytest.approx(factor, rel=0.01)
    assert found.copies == 1.0
    predicted = foretold(tape, machine, plan, found)
    assert predicted.step_s == pytest.approx(measured, rel=0.01)
    assert predicted.peak_device_bytes == plan.predicted.peak_device_bytes


def test_what_remapping_takes_is_said_of_that_and_not_of_copies() -> None:
    tape, machine = blocks(10), gpu(link=4e9)
    plan = planner.plan(tape, machine, Budget(int(0.4 * baseline_curve(tape).max()), LOTS, 0), RULES)
    measured_s = 1.2 * plan.predicted.step_s
    found = explanation(tape, machine, plan, lap_s(tape, measured_s), spent_s=(2e-3, 0.0), remaps=True)
    assert found == Rates(remaps_s=pytest.approx(measured_s - plan.predicted.step_s))
    predicted = foretold(tape, machine, plan, found)
    assert predicted.step_s == pytest.approx(measured_s)
    assert predicted.stall_s == pytest.approx(plan.predicted.stall_s + found.remaps_s)
    quick_s = 0.9 * plan.predicted.step_s
    assert explanation(tape, machine, plan, lap_s(tape, quick_s), remaps=True).remaps_s == 0.0


def test_a_device_that_waited_for_the_program_says_nothing_of_copies() -> None:
    tape, machine = blocks(10), gpu(link=4e9)
    plan = planner.plan(tape, machine, Budget(int(0.4 * baseline_curve(tape).max()), LOTS, 0), RULES)
    measured_s = 1.3 * plan.predicted.step_s
    found = explanation(tape, machine, plan, lap_s(tape, measured_s), spent_s=(2e-3, 0.0))
    assert (found.ops, found.copies) == (1.0, 1.0)
    assert found.pace is not None
    assert found.pace.lap_s(Load.of(tape, plan.moves)) == pytest.approx(lap_s(tape, measured_s))
    predicted = foretold(tape, machine, plan, found)
    assert predicted.step_s == pytest.approx(measured_s)
    assert predicted.stall_s == pytest.approx(plan.predicted.stall_s + 0.3 * plan.predicted.step_s)
    quick_s = 0.5 * plan.predicted.step_s  # quicker than was predicted: that is no waiting
    assert explanation(tape, machine, plan, lap_s(tape, quick_s), spent_s=(2e-3, 0.0)).pace is None


def test_what_a_program_takes_for_each_op_that_runs_again() -> None:
    """Told apart from what it takes for each value; and of values that gain as much, the one with the short
    history is dropped."""
    tape, machine = blocks(8), gpu(link=1e8)
    long = {value.id for value in tape.values if value.recipe and value.id % 4 == 1}
    values = tuple(
        replace(value, recipe=(value.birth - 1, value.birth), sources=()) if value.id in long else value
        for value in tape.values
    )
    quick = tuple(replace(op, time_s=1e-3) for op in tape.ops)
    tape = replace(tape, values=values, ops=quick)
    budget = Budget(int(0.85 * baseline_curve(tape).max()), LOTS, 0)
    plan = joint.plan(tape, machine, budget, RULES)
    load = Load.of(tape, plan.moves)
    assert load.leaving == len(plan.moves)
    assert load.again == sum(
        len(tape.values[move.value].recipe) for move in plan.moves if move.choice is Choice.RECOMPUTE
    )
    found = explanation(tape, machine, plan, 10.0, spent_s=(3.0, 5.0))
    assert found.pace is not None
    assert found.pace.each_s == pytest.approx(3.0 / load.leaving)
    assert found.pace.again_s == pytest.approx(5.0 / load.again)
    assert found.pace.lap_s(load) == pytest.approx(10.0)
    slow = joint.plan(tape, machine, budget, RULES, pace=Pace(0.0, 1e-4, again_s=1.0))
    dropped = {move.value for move in slow.moves if move.choice is Choice.RECOMPUTE}
    assert dropped
    assert not dropped & long


def test_it_is_not_carried_too_far() -> None:
    tape, machine = blocks(10), gpu(link=4e9)
    plan = planner.plan(tape, machine, Budget(int(0.4 * baseline_curve(tape).max()), LOTS, 0), RULES)
    assert explanation(tape, machine, plan, 1e9).ops == pytest.approx(MOST, rel=0.01)
    assert explanation(tape, machine, plan, 0.0).ops == pytest.approx(LEAST, rel=0.01)


def test_heat_is_how_much_longer_the_same_ops_take() -> None:
    tape = blocks(4)
    hot = [(op.name, 1.25 * op.time_s) for op in tape.ops]
    assert heat(tape, hot) == pytest.approx(1.25)
    assert heat(tape, hot[:-3]) == 1.0
    assert heat(tape, [("another", 1.0), *hot[1:]]) == 1.0
    waited = [(hot[0][0], 1e3), *hot[1:]]  # for the allocator, inside of one op
    assert heat(tape, waited) == pytest.approx(1.25)
    assert heat(tape, [(name, 100 * time_s) for name, time_s in hot]) == MOST
    later = [
        (name, time_s if op.phase is not Phase.BETWEEN else 9.0)
        for (name, time_s), op in zip(hot, tape.ops, strict=True)
    ]
    assert heat(tape, later) == pytest.approx(1.25)


def test_rates_in_words() -> None:
    assert str(Rates()) == "all as it was measured"
    assert (
        str(Rates(1.25, 0.5))
        == "ops taken to be 1.25 times as long and copies taken to be 0.50 times as fast"
    )
    assert str(Rates(pace=Pace(0.25, 3e-4))) == (
        "the program taken to need 250.0 ms and 300 us for each value that leaves"
    )
    assert str(Rates(pace=Pace(0.25, 3e-4, 5e-5))) == (
        "the program taken to need 250.0 ms, 300 us for each value that leaves and 50 us for each op that "
        "runs again"
    )
    assert str(Rates(remaps_s=0.028)) == "remapping memory taken to need 28.0 ms"
    assert str(Rates(copies=0.5)) == "copies taken to be 0.50 times as fast"
    assert str(Rates(ops=1.25)) == "ops taken to be 1.25 times as long"
