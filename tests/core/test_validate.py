"""The validator: silent on what the planner makes, and a named reason for each way to spoil it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tapes import GIB, MIB, chain, cpu, gpu

from torchlms.core.plan import Budget, Choice, Decision, Plan
from torchlms.core.planner import plan
from torchlms.core.simulate import prediction, simulate
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value
from torchlms.core.validate import Reason, validate

if TYPE_CHECKING:
    from collections.abc import Callable

TAPE = chain()
MACHINE = gpu()
GOOD = plan(TAPE, MACHINE, Budget(GIB, 8 * GIB, 8 * GIB))
DISK = plan(TAPE, MACHINE, Budget(GIB, 320 * MIB, 8 * GIB))


def test_good_plans_are_silent() -> None:
    assert GOOD.moves
    assert {move.choice for move in DISK.moves} == {Choice.HOST, Choice.DISK}
    for good in (GOOD, DISK):
        assert validate(TAPE, good, MACHINE) == []
        assert validate(TAPE, good) == []


def _first(**changes: object) -> Callable[[Plan], Plan]:
    return lambda good: replace(good, decisions=(replace(good.decisions[0], **changes), *good.decisions[1:]))


def _budget(**changes: int) -> Callable[[Plan], Plan]:
    return lambda good: replace(good, budget=replace(good.budget, **changes))


SPOILT: list[tuple[Reason, Callable[[Plan], Plan]]] = [
    (Reason.WRONG_TAPE, lambda good: replace(good, fingerprint="0" * 16)),
    (Reason.WRONG_TORCH, lambda good: replace(good, torch="1.0")),
    (Reason.WRONG_DEVICE, lambda good: replace(good, device="cpu")),
    (Reason.UNKNOWN_VALUE, _first(value=len(TAPE.values))),
    (Reason.UNKNOWN_VALUE, _first(value=-1)),
    (Reason.UNKNOWN_STRETCH, _first(stretch=7)),
    (Reason.DECIDED_TWICE, lambda good: replace(good, decisions=good.decisions + good.decisions[-1:])),
    (Reason.NO_RECIPE, _first(choice=Choice.RECOMPUTE)),
    (Reason.RELEASE_EARLY, _first(release_op=0)),
    (Reason.RELEASE_EARLY, _first(release_op=-1)),
    (Reason.RELEASE_LATE, lambda good: _first(release_op=good.decisions[0].reload_op)(good)),
    (Reason.RELEASE_LATE, _first(release_op=len(TAPE.ops))),
    (Reason.RELOAD_LATE, _first(reload_op=len(TAPE.ops))),
    (Reason.RELOAD_LATE, _first(reload_op=-1)),
    (Reason.MISALIGNED, _first(offset_bytes=100)),
    (Reason.MISALIGNED, _first(offset_bytes=-1)),
    (Reason.OVERLAP, lambda good: _first(offset_bytes=good.decisions[1].offset_bytes + 512)(good)),
    (Reason.OVER_DEVICE, _budget(device_bytes=GOOD.predicted.peak_device_bytes - 1)),
    (Reason.OVER_DEVICE, lambda good: replace(good, decisions=())),
    (Reason.OVER_HOST, _budget(host_bytes=GOOD.predicted.arena_bytes - 1)),
]


@pytest.mark.parametrize(("reason", "spoil"), SPOILT)
def test_each_way_to_spoil_a_plan(reason: Reason, spoil: Callable[[Plan], Plan]) -> None:
    faults = validate(TAPE, spoil(GOOD), MACHINE)
    assert reason in {fault.reason for fault in faults}
    assert all(fault.reason.value in str(fault) for fault in faults)


def test_what_is_not_movable() -> None:
    value = GOOD.decisions[0].value
    values = list(TAPE.values)
    values[value] = replace(values[value], movable=False, why_not="shared with numpy")
    fixed = replace(TAPE, values=tuple(values))
    faults = validate(fixed, GOOD, MACHINE)
    assert [fault.reason for fault in faults][:1] == [Reason.NOT_MOVABLE]
    assert "shared with numpy" in faults[0].detail


def test_host_without_a_link() -> None:
    assert Reason.NO_LINK in {fault.reason for fault in validate(TAPE, GOOD, cpu())}
    tape = replace(TAPE, device="cpu")
    assert Reason.NO_LINK in {fault.reason for fault in validate(tape, replace(GOOD, device="cpu"))}


def test_disk_budgets_and_alignment() -> None:
    assert {fault.reason for fault in validate(TAPE, _budget(disk_bytes=4096)(DISK), MACHINE)} == {
        Reason.OVER_DISK
    }
    tight = _budget(host_bytes=DISK.predicted.arena_bytes - 1)(DISK)
    assert {fault.reason for fault in validate(TAPE, tight, MACHINE)} == {Reason.OVER_HOST}
    shifted = tuple(
        replace(decision, offset_bytes=decision.offset_bytes + 512)
        if decision.choice is Choice.DISK
        else decision
        for decision in DISK.decisions
    )
    assert Reason.MISALIGNED in {
        fault.reason for fault in validate(TAPE, replace(DISK, decisions=shifted), MACHINE)
    }


def test_staging_counts() -> None:
    """All on disk: host memory still holds two of the largest on their way."""
    budget = Budget(GIB, 128 * MIB, 8 * GIB)
    made = plan(TAPE, MACHINE, budget)
    assert {move.choice for move in made.moves} == {Choice.DISK}
    assert made.predicted.arena_bytes == 128 * MIB
    assert validate(TAPE, _budget(host_bytes=128 * MIB - 1)(made), MACHINE)[0].reason is Reason.OVER_HOST


def _ring() -> tuple[Tape, Plan]:
    """Two states, each idle around the end; the second one's stretch begins where the first one's ends."""
    ops = tuple(Op(f"op{index}", "", Phase.FORWARD, 1.0, (), ()) for index in range(6))
    values = (
        Value(0, Kind.STATE, 1024, -1, 6, (Stretch(4, 2),), movable=True),
        Value(1, Kind.STATE, 1024, -1, 6, (Stretch(3, 1),), movable=True),
    )
    tape = Tape(ops, values, 0, "cuda", "2.13")
    decisions = (Decision(0, 0, Choice.HOST, 5, 1, 0), Decision(1, 0, Choice.HOST, 4, 5, 1024))
    predicted = prediction(simulate(tape, MACHINE, decisions))
    return tape, Plan(tape.fingerprint, "2.13", "cuda", Budget(2048, 2048, 0), decisions, predicted)


@pytest.mark.parametrize("dropped", [True, False])
def test_a_place_is_free_once_something_is_made_from_what_has_come_back(dropped: bool) -> None:
    """Value 1 is made again from value 0 before op 5, where that has left its place; autograd asks for 0
    itself before op 6, and there value 2 goes to the same place."""
    ops = tuple(Op(f"op{index}", "", Phase.FORWARD, 1.0, (), ()) for index in range(10))
    stretches = ((Stretch(1, 6),), (Stretch(2, 5),), (Stretch(6, 9),))
    values = tuple(
        Value(number, Kind.ACTIVATION, 512, number, 9, idle, movable=True)
        for number, idle in enumerate(stretches)
    )
    values = (values[0], replace(values[1], recipe=(1,), sources=(0,)), values[2])
    tape = Tape(ops, values, 0, "cuda", "2.13")
    moves = (Decision(0, 0, Choice.HOST, 2, 4, 0), Decision(2, 0, Choice.HOST, 7, 8, 0))
    drop = (Decision(1, 0, Choice.RECOMPUTE, 2, 5),) if dropped else ()
    predicted = prediction(simulate(tape, MACHINE, moves))
    made = Plan(tape.fingerprint, "2.13", "cuda", Budget(4096, 512, 0), (*moves, *drop), predicted)
    found = [fault.reason for fault in validate(tape, made, MACHINE)]
    assert found == ([] if dropped else [Reason.OVERLAP])


def test_wrapping_stretches() -> None:
    tape, good = _ring()
    assert validate(tape, good, MACHINE) == []

    def reasons(**changes: object) -> set[Reason]:
        return {fault.reason for fault in validate(tape, _first(**changes)(good), MACHINE)}

    assert reasons(offset_bytes=512) == {Reason.OVERLAP}
    assert reasons(release_op=3) == {Reason.RELEASE_EARLY}
    assert reasons(reload_op=3) == {Reason.RELOAD_LATE}
    assert reasons(release_op=1) == {Reason.RELEASE_LATE}
    assert reasons(release_op=0) == set()  # lets go only in the next lap
