"""Values made in passing: for each that is made from them, and once more for themselves."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tapes import MIB, gpu
from test_drops import LOTS, RULES, blocks, candidates, chained

from torchlms.core import joint
from torchlms.core.again import with_drops
from torchlms.core.calibrate import foretold
from torchlms.core.curve import baseline_curve
from torchlms.core.drops import Drops, dropped_while, replay_s, return_ops
from torchlms.core.pace import Load
from torchlms.core.plan import Budget, Choice, Decision, Plan, Prediction
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value
from torchlms.core.validate import Reason, validate
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall


def all_in_passing(tape: Tape) -> Drops:
    values = tuple(candidates(tape))
    return Drops(values, frozenset(value.id for value in values))


def test_a_recipe_goes_through_what_is_made_in_passing() -> None:
    tape = chained(blocks(4))
    first, second, third = all_in_passing(tape).through
    assert (first.recipe, first.sources) == ((1,), (0,))
    assert (second.recipe, second.sources) == ((1, 3), (0, 2))
    assert (third.recipe, third.sources) == ((1, 3, 5), (0, 2, 4))
    kept = Drops(tuple(candidates(tape)), frozenset({1}))
    assert [value.recipe for value in kept.through] == [(1,), (1, 3), (5,)]


def test_nothing_stays_because_something_was_made_from_it() -> None:
    tape = chained(blocks(4))
    stays, passes = Drops(tuple(candidates(tape))), all_in_passing(tape)
    assert set(return_ops(stays.through).values()) == {candidates(tape)[-1].idle[0].stop}
    needed = {value.id: value.idle[0].stop for value in passes.values}
    assert return_ops(passes.through) == needed
    kept, passed = with_drops(tape, stays), with_drops(tape, passes)
    twice_s = sum(op.time_s for op in passed.ops) - sum(op.time_s for op in kept.ops)
    assert twice_s == pytest.approx(3e-3)  # the first twice more, the second once
    later = slice(min(needed.values()) + 1, max(needed.values()))
    size_bytes = passes.values[0].size_bytes
    assert (baseline_curve(kept)[later] - baseline_curve(passed)[later]).max() == 2 * size_bytes


def test_what_is_there_anyway_is_not_made_for_others() -> None:
    """Not dropped yet, or asked for before."""
    tape = chained(blocks(3))
    first, second = candidates(tape)
    held = replace(first, idle=(Stretch(second.idle[0].stop + 1, first.idle[0].stop + 2),))
    early = replace(first, idle=(Stretch(first.idle[0].start, second.idle[0].stop),))
    for there in (held, early):
        assert Drops.passing_where_away((there, second), frozenset({there.id})) == Drops((there, second))
    assert Drops.passing_where_away((first, second), frozenset({first.id})).passing == {first.id}
    assert not Drops.passing_where_away((first, second), frozenset({second.id})).passing, "of no use"


def test_the_results_of_the_op_that_asks_come_later() -> None:
    """Where a recipe takes more for a moment than the op that asks, the larger of both is needed."""
    tape = blocks(3)
    value = candidates(tape)[0]
    stop = value.idle[0].stop
    ops = list(tape.ops)
    ops[value.recipe[0]] = replace(ops[value.recipe[0]], scratch_bytes=600 * MIB)
    result = Value(
        id=len(tape.values), kind=Kind.GRADIENT, size_bytes=500 * MIB, birth=stop, death=len(ops) - 1
    )
    tape = replace(tape, ops=tuple(ops), values=(*tape.values, result))
    made = with_drops(tape, Drops((value,)))
    assert made.ops[stop].scratch_bytes == 100 * MIB
    assert baseline_curve(made)[stop] == baseline_curve(with_drops(tape, Drops()))[stop] + 100 * MIB


def decided(tape: Tape, drops: Drops, budget_bytes: int) -> Plan:
    """A plan that drops so, and nothing else."""
    made = drops.through
    returns = return_ops(made)
    decisions = tuple(
        Decision(
            value.id, 0, Choice.RECOMPUTE, dropped_while(value).start, returns[value.id],
            passing=value.id in drops.passing,
        )
        for value in made
    )  # fmt: skip
    return Plan(
        tape.fingerprint, tape.torch, tape.device, Budget(budget_bytes, LOTS, 0), decisions,
        Prediction(0, 0, 0.0, 0.0, 0.0),
    )  # fmt: skip


def shaken(seed: int) -> Tape:
    """A chain of blocks of all sizes, with workspaces, and results in backward."""
    dice = random.Random(seed)
    tape = chained(blocks(6), back=dice.choice([1, 1, 2]))
    values = [replace(value, size_bytes=dice.randrange(1, 9) * MIB) for value in tape.values]
    ops = [replace(op, scratch_bytes=dice.choice([0, 0, 3, 7]) * MIB) for op in tape.ops]
    for op in range(len(ops) // 2, len(ops) - 1, 2):
        values.append(
            Value(len(values), Kind.GRADIENT, dice.randrange(1, 9) * MIB, op, min(op + 2, len(ops) - 1))
        )
    return replace(tape, ops=tuple(ops), values=tuple(values))


@pytest.mark.parametrize("seed", range(40))
def test_planner_and_referee_count_the_same_bytes(seed: int) -> None:
    """``validate`` shares no code with what plans are made by."""
    tape = shaken(seed)
    dice = random.Random(seed)
    values = tuple(value for value in candidates(tape) if dice.random() < 0.8)
    drops = Drops(values, frozenset(value.id for value in values if dice.random() < 0.6))
    peak_bytes = int(baseline_curve(with_drops(tape, drops)).max())
    assert validate(tape, decided(tape, drops, peak_bytes)) == []
    faults = validate(tape, decided(tape, drops, peak_bytes - 1))
    assert {fault.reason for fault in faults} == {Reason.OVER_DEVICE}


def test_a_plan_that_is_read_drops_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tape = chained(blocks(4))
    drops = all_in_passing(tape)
    plan = decided(tape, drops, LOTS)
    plan.save(tmp_path / "plan.json")
    assert Drops.of(tape, Plan.load(tmp_path / "plan.json").moves) == drops
    assert Load.of(tape, plan.moves).again == 1 + 2 + 3
    again_s = sum(replay_s(tape, value) for value in drops.through)
    compute_s = sum(op.time_s for op in tape.ops)
    assert foretold(tape, gpu(), plan).compute_s == pytest.approx(compute_s + again_s)


def stem(size_bytes: int = 1024 * MIB) -> Tape:
    """A large value made of what comes in, another made of that, and a rest that fills the memory.

    Backward of the second needs two more that are as large: the first, which it is made from, must be away.
    """
    forward = [("conv", 4e-3), ("norm", 2e-3), ("pool", 2e-3), *[("deep", 5e-3)] * 6]
    backward = [*[("deep_backward", 10e-3)] * 6, ("pool_backward", 3e-3), ("relu_backward", 3e-3)]
    backward += [("norm_backward", 4e-3), ("conv_backward", 8e-3)]
    ops = [Op(name, "stem", Phase.FORWARD, time_s, (), ()) for name, time_s in forward]
    ops += [Op(name, "stem", Phase.BACKWARD, time_s, (), ()) for name, time_s in backward]
    pool_backward, relu_backward, norm_backward, conv_backward = range(15, 19)
    big = {"kind": Kind.ACTIVATION, "size_bytes": size_bytes, "movable": True}
    gradient = {"kind": Kind.GRADIENT, "size_bytes": size_bytes}
    values = [
        Value(0, Kind.INPUT, size_bytes // 8, -1, len(ops), saved=0, saved_at=0),
        Value(
            id=1, birth=0, death=norm_backward, idle=(Stretch(2, norm_backward),), saved=1, saved_at=1,
            recipe=(0,), sources=(0,), op="conv", **big,
        ),
        Value(
            id=2, birth=1, death=relu_backward, idle=(Stretch(3, pool_backward),), saved=2, saved_at=2,
            recipe=(1,), sources=(1,), op="norm", **big,
        ),
        Value(id=3, birth=pool_backward, death=relu_backward, **gradient),
        Value(id=4, birth=relu_backward, death=norm_backward, **gradient),
        Value(id=5, kind=Kind.OTHER, size_bytes=3 * size_bytes, birth=3, death=pool_backward - 1),
        Value(id=6, birth=norm_backward, death=conv_backward, **gradient),
    ]  # fmt: skip
    return Tape(tuple(ops), tuple(values), 0, "cuda", "2.13")


def test_the_planner_makes_a_stem_twice() -> None:
    """Where moving cannot hide, and both values cannot be there at once, the first is made in passing."""
    tape, machine = stem(), gpu(link=20e9)
    budget = Budget(int(3.4 * 1024 * MIB), LOTS, 0)
    made = joint.plan(tape, machine, budget, RULES)
    assert validate(tape, made, machine) == []
    assert [(move.value, move.choice, move.passing) for move in made.moves] == [
        (1, Choice.RECOMPUTE, True),
        (2, Choice.RECOMPUTE, False),
    ]
    assert "and in passing for what is made from it" in made.moves[0].reason
    assert made.predicted.stall_s == 0
    assert made.predicted.compute_s == pytest.approx(sum(op.time_s for op in tape.ops) + 4e-3 + 6e-3)
    again = joint.plan(tape, machine, budget, RULES, like=made)
    assert again.moves == made.moves


def test_where_nothing_else_fits() -> None:
    """No host memory and no disk: only with the first value made in passing is there a plan."""
    tape, machine = stem(), gpu()
    budget = Budget(int(3.4 * 1024 * MIB), 0, 0)
    made = joint.plan(tape, machine, budget, RULES)
    assert validate(tape, made, machine) == []
    assert [move.value for move in made.moves if move.passing] == [1]
    with pytest.raises((BudgetTooSmall, HostBudgetTooSmall)):
        joint.plan(tape, machine, replace(budget, device_bytes=3000 * MIB), RULES)
