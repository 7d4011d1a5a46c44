"""Tapes on which what the program holds may leave as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from tapes import MIB, gpu

from torchlms.core import joint
from torchlms.core.again import with_drops
from torchlms.core.bound import lower_bound
from torchlms.core.curve import baseline_curve, smallest_budget
from torchlms.core.drops import Drops, droppable, dropped_in, dropped_while
from torchlms.core.held import with_held
from torchlms.core.plan import Budget, Choice, Decision
from torchlms.core.planner import plan
from torchlms.core.rules import Rules
from torchlms.core.simulate import simulate
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value
from torchlms.core.validate import Reason, validate

LOTS = 1 << 50
RULES = Rules(min_bytes=0)


def skips(count: int = 6, *, size_bytes: int = 64 * MIB) -> Tape:
    """``count`` ops each make a wide value, which waits in the program until one of ``count`` later ops has
    read it, and then for the backward pass."""
    total = 3 * count
    phases = [Phase.FORWARD] * (2 * count) + [Phase.BACKWARD] * count
    reads = [(), *((index - 1,) for index in range(1, count))]
    reads += [(index,) for index in range(count)] + [(index,) for index in range(count)]
    writes = [(index,) for index in range(count)] + [()] * (2 * count)
    ops = tuple(Op("op", "", phases[at], 5e-3, reads[at], writes[at]) for at in range(total))
    values = []
    for index in range(count):
        read, needed = count + index, 2 * count + index
        values.append(
            Value(
                id=index, kind=Kind.ACTIVATION, size_bytes=size_bytes, birth=index, death=needed,
                idle=(Stretch(read + 2, needed),) if read + 2 < needed else (),
                saved=index, saved_at=index + 1, movable=True, op="op", recipe=(index,), sources=(),
                held=(
                    Stretch(index + 2, read, held_until=read, touched=True),
                    Stretch(read + 1, read + 2, held_until=read + 2),
                ),
            )
        )  # fmt: skip
    return Tape(ops, tuple(values), 0, "cuda", "2.13")


def test_what_is_held_and_then_idle_is_one_stretch() -> None:
    tape = with_held(skips())
    value = tape.values[2]
    first, second = value.idle
    assert (first.start, first.stop, first.free_from, first.touched) == (4, 8, 8, True)
    assert (second.start, second.stop, second.free_from, second.touched) == (9, 14, 10, False)
    assert value.held == ()
    assert with_held(tape) is tape


def test_it_can_be_dropped_once_the_program_lets_go() -> None:
    tape = with_held(skips())
    value = tape.values[2]
    assert dropped_in(value) == 1
    assert dropped_while(value) == Stretch(10, 14)
    dropped = with_drops(tape, Drops((value,))).values[2]
    assert dropped.death == 9
    assert dropped.idle == value.idle[:1], "it may still be away before"
    assert dropped.movable
    held_to_the_end = replace(value, idle=(Stretch(4, 14, held_until=14),))
    assert not droppable(tape, held_to_the_end)


def test_a_drop_that_comes_too_early_is_seen() -> None:
    tape = with_held(skips())
    good = joint.plan(tape, gpu(link=1e9), Budget(smallest_budget(tape), LOTS, 0), RULES)
    early = Decision(2, 1, Choice.RECOMPUTE, release_op=9, reload_op=14)
    faults = validate(tape, replace(good, decisions=(early,), budget=Budget(LOTS, 0, 0)))
    assert [fault.reason for fault in faults] == [Reason.STILL_HELD]
    late = replace(early, release_op=10)
    assert validate(tape, replace(good, decisions=(late,), budget=Budget(LOTS, 0, 0))) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("link", [1e9, 20e9])
def test_plans_are_legal_and_predicted_as_simulated(share: float, link: float) -> None:
    tape, machine = with_held(skips()), gpu(link=link)
    least, most = smallest_budget(tape), int(baseline_curve(tape).max())
    assert least < smallest_budget(skips())
    budget = Budget(least + int(share * (most - least)), LOTS, 0)
    made = joint.plan(tape, machine, budget, RULES)
    assert validate(tape, made, machine) == []
    assert made.predicted.peak_device_bytes <= budget.device_bytes
    assert made.predicted.step_s >= lower_bound(tape, machine, budget, recompute=True) * (1 - 1e-9)
    assert any(tape.values[move.value].idle[move.stretch].touched for move in made.moves) or share > 0.5


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_tapes(data: st.DataObject) -> None:
    """A value of a random tape is also held for a while before it lies idle."""
    tape = data.draw(strategies.tapes(max_ops=12, max_values=6))
    values = []
    for value in tape.values:
        idle = value.idle[0]
        start = data.draw(st.integers(max(0, value.birth + 1), idle.start))
        middle = data.draw(st.integers(start, idle.start))
        held = [Stretch(start, middle, held_until=middle, touched=True)] if start < middle else []
        if middle + 1 < idle.start:
            held.append(Stretch(middle + 1, idle.start, held_until=idle.start))
        values.append(replace(value, held=tuple(held)))
    loose = with_held(replace(tape, values=tuple(values)))
    machine = data.draw(strategies.machines())
    least = smallest_budget(loose)
    spare = data.draw(st.integers(0, int(baseline_curve(loose).max()) - least))
    budget = Budget(least + spare, LOTS if machine.link else 0, LOTS)
    made = plan(loose, machine, budget)
    assert validate(loose, made, machine) == []
    assert made.predicted.peak_device_bytes <= budget.device_bytes
    assert simulate(loose, machine, made.decisions).step_s == pytest.approx(made.predicted.step_s)
    assert made.predicted.step_s >= lower_bound(loose, machine, budget) * (1 - 1e-9)
