"""Holes and pinches, on an allocator made of arithmetic: best fit on a line, remapping when it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pages import MIB, Piece

from torchlms.core.plan import Budget, Choice, Decision, Plan, Prediction
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value
from torchlms.eager import holes as holes_module
from torchlms.eager.convolution import blocks_of
from torchlms.eager.holes import Holes
from torchlms.eager.program import Deed, Program
from torchlms.memory.compaction import Block
from torchlms.memory.device import CudaDevice

UNIT = 100 * MIB  # sizes below are in these


class Line:
    """Memory from 0 to ``units``; whoever holds a ``Piece`` holds its address."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.used: dict[int, int] = {}
        self.remaps = 0

    def holes(self) -> list[tuple[int, int]]:
        found, at = [], 0
        for start, size in [*sorted(self.used.items()), (self.units, 0)]:
            if start > at:
                found.append((at, start - at))
            at = start + size
        return found

    def take(self, units: int) -> Piece:
        fitting = [(size, start) for start, size in self.holes() if size >= units]
        if not fitting:
            self.remaps += 1
            raise torch.OutOfMemoryError("no hole")
        start = min(fitting)[1]
        self.used[start] = units
        return Piece(self.used, start, UNIT)

    def runs(self, device: torch.device) -> list[list[Block]]:
        del device
        pieces = [(start, size, False) for start, size in self.used.items()]
        pieces += [(start, size, True) for start, size in self.holes()]
        return [[Block(start * UNIT, size * UNIT, free) for start, size, free in sorted(pieces)]]


class Resting:
    """Stands for a slot whose value could be anywhere."""

    def __init__(self, line: Line, units: int, *, movable: bool = True) -> None:
        self.bytes: Any = line.take(units)
        self.size_bytes = units * UNIT
        self.movable = movable

    def at_rest(self) -> bool:
        return self.movable

    def move_to(self, target: Piece) -> None:
        self.bytes = target


class Slots(list[Any]):
    def living(self) -> Any:
        return iter(self)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    made = Line(20)
    monkeypatch.setattr(holes_module.private, "mapped_runs", made.runs)
    monkeypatch.setattr(holes_module.private, "allocator_remaps", lambda device: made.remaps)
    monkeypatch.setattr(Holes, "_empty", lambda self, size: made.take(-(-size // UNIT)))
    monkeypatch.setattr(Holes, "_level", lambda self: None)
    return made


def cuda_device() -> CudaDevice:
    device = object.__new__(CudaDevice)
    device.torch_device = torch.device("cuda", 0)
    device.cap_bytes = 20 * UNIT
    return device


def striped(line: Line, *, movable: bool = True) -> Slots:
    """Values of one unit with holes of one unit between them."""
    slots = Slots()
    for _ in range(10):
        slots.append(Resting(line, 1, movable=movable))
        slots.append(Resting(line, 1))
    del slots[1::2]
    assert [size for _, size in line.holes()] == [1] * 10
    return slots


def test_a_hole_is_opened_by_moving_what_rests(line: Line) -> None:
    slots = striped(line)
    opener = Holes(cuda_device(), slots)
    opener.open([5 * UNIT])
    assert max(size for _, size in line.holes()) >= 5
    assert len({slot.bytes.start for slot in slots}) == len(slots) == 10
    assert opener.opened == 1
    assert opener.moved_bytes > 0
    assert line.remaps == 0


def test_blocks_are_placed_in_the_order_of_the_op(line: Line) -> None:
    slots = striped(line)
    Holes(cuda_device(), slots).open([3 * UNIT, 6 * UNIT])
    first, second = line.take(3), line.take(6)
    assert line.remaps == 0
    assert first.start != second.start


def test_what_cannot_be_moved_is_left_alone(line: Line) -> None:
    slots = striped(line, movable=False)
    before = [slot.bytes.start for slot in slots]
    opener = Holes(cuda_device(), slots)
    opener.open([5 * UNIT])
    assert [slot.bytes.start for slot in slots] == before
    assert opener.opened == 0


def test_small_blocks_are_not_worth_a_look(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(device: torch.device) -> None:
        raise AssertionError

    monkeypatch.setattr(holes_module.private, "mapped_runs", never)
    Holes(cuda_device(), striped(line)).open([MIB])


# -- learning --------------------------------------------------------------------------------------

OPS = tuple(Op(f"op{index}", "layer", Phase.FORWARD, 1.0, (), (), scratch_bytes=index) for index in range(6))
TAPE = Tape(
    OPS,
    (
        Value(
            0,
            Kind.ACTIVATION,
            1000,
            birth=0,
            death=5,
            idle=(Stretch(1, 5),),
            saved=0,
            saved_at=1,
            movable=True,
        ),
        Value(1, Kind.ACTIVATION, 77, birth=3, death=4),
    ),
    0,
    "cuda",
    "2.13",
)


def program(*, moves: bool = True) -> Program:
    decisions = (Decision(0, 0, Choice.HOST, release_op=2, reload_op=4),) if moves else ()
    return Program(
        TAPE, Plan("f", "2.13", "cuda", Budget(1, 1, 1), decisions, Prediction(0, 0, 0.0, 0.0, 0.0))
    )


def test_a_pinch_becomes_an_action_before_its_op(line: Line) -> None:
    made = program()
    watcher = Holes(cuda_device(), Slots())
    watcher.begin_step(made)
    assert watcher.learning
    watcher.note(1)
    line.remaps += 1
    watcher.note(3)
    watcher.note(4)
    watcher.end_step()
    assert made.pinches == {3}
    assert [(action.op, action.deed) for action in made.actions] == [
        (1, Deed.SEND),
        (2, Deed.RELEASE),
        (3, Deed.OPEN),
        (4, Deed.FETCH),
    ]
    assert made.blocks_bytes(3) == [77, 3]


def test_a_hole_for_a_convolution_is_as_large_as_the_room_that_is_reserved_for_it() -> None:
    name = "aten.convolution_backward.default"
    ops = (Op("data", "", Phase.FORWARD, 1.0, (), ()), Op(name, "", Phase.BACKWARD, 1.0, (0,), (), 424))
    gradients = [Value(number, Kind.GRADIENT, size, birth=1, death=1) for number, size in ((0, 216), (1, 9))]
    made = Program(Tape(ops, tuple(gradients), 0, "cuda", "2.13"), program().plan)
    assert made.blocks_bytes(1) == [216, 9, 433] == list(blocks_of((216, 9), 424))


def test_learning_ends_when_steps_are_calm_and_comes_back_when_they_are_not(line: Line) -> None:
    made = program()
    watcher = Holes(cuda_device(), Slots())
    steps = 0
    while made.lessons:
        watcher.begin_step(made)
        watcher.end_step()
        steps += 1
    assert steps < 10
    watcher.begin_step(made)
    assert not watcher.learning
    line.remaps += 1
    watcher.end_step()
    watcher.begin_step(made)
    assert watcher.learning


def remap_in_vain(made: Program, watcher: Holes, line: Line) -> None:
    """Steps in each of which the allocator remaps at the same op, until nothing more is tried."""
    for _ in range(40):
        watcher.begin_step(made)
        line.remaps += 1
        watcher.note(2)
        watcher.end_step()


def test_a_plan_that_is_followed_again_learns_where_memory_lies_now(line: Line) -> None:
    """Nothing helped before; since then other plans ran, and other holes are there."""
    made = program()
    watcher = Holes(cuda_device(), Slots())
    remap_in_vain(made, watcher, line)
    made.learn_anew()
    watcher.begin_step(made)
    assert watcher.learning
    line.remaps += 1
    watcher.note(1)
    watcher.end_step()
    assert {1, 2} <= made.pinches


def test_learning_ends_where_nothing_helps(line: Line) -> None:
    made = program()
    watcher = Holes(cuda_device(), Slots())
    remap_in_vain(made, watcher, line)
    assert made.lessons == 0
    assert not made.scattered


def test_memory_is_put_in_order_before_the_first_two_lessons(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = program()
    watcher = Holes(cuda_device(), Slots())
    levelled: list[int] = []
    steps: list[int] = []
    monkeypatch.setattr(Holes, "_level", lambda self: levelled.append(len(steps)))

    def step() -> None:
        watcher.begin_step(made)
        line.remaps += 1
        watcher.note(len(steps) % 6)
        watcher.end_step()
        steps.append(line.remaps)

    for _ in range(6):
        step()
    assert levelled == [0, 1]
    made.learn_anew()
    for _ in range(4):
        step()
    assert levelled == [0, 1, 6, 7]


def test_nothing_is_watched_where_nothing_moves(line: Line) -> None:
    watcher = Holes(cuda_device(), Slots())
    watcher.begin_step(program(moves=False))
    assert not watcher.learning
    watcher.begin_step(None)
    assert not watcher.learning


def test_what_stood_in_the_way_is_put_elsewhere_the_next_time(line: Line) -> None:
    tape = Tape(
        OPS,
        (
            Value(0, Kind.ACTIVATION, UNIT, 0, 5, idle=(Stretch(1, 5),), saved=0, saved_at=1, movable=True),
            Value(1, Kind.GRADIENT, UNIT, birth=1, death=4),
            Value(2, Kind.GRADIENT, UNIT, birth=1, death=2),  # gone by then
        ),
        0,
        "cuda",
        "2.13",
    )
    plan = program().plan
    made = Program(tape, plan)
    for _ in range(2):
        made.learn({3}, disturbed=True)
    assert made.tucked == {1}
    assert (1, Deed.TUCK) in [(action.op, action.deed) for action in made.actions]
    assert (2, Deed.UNTUCK) in [(action.op, action.deed) for action in made.actions]


def test_memory_that_runs_out_while_a_hole_is_opened_is_nobodys_business(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op that the hole is for has not even begun, and may well find room."""
    kept = line.take(4)
    opener = Holes(cuda_device(), Slots())

    def none_left(opener: Holes, size_bytes: int) -> None:
        raise torch.OutOfMemoryError("no hole")

    monkeypatch.setattr(Holes, "_empty", none_left)
    opener.open([10 * UNIT, 10 * UNIT])  # the second finds no hole, once the first has one
    assert opener.ooms == 1
    opener.tuck([UNIT])
    assert opener.ooms == 2
    assert opener.untuck() == 0
    assert kept.start == 0


def test_a_tucked_block_goes_to_the_far_end(line: Line) -> None:
    kept = line.take(4)
    opener = Holes(cuda_device(), Slots())
    opener.tuck([2 * UNIT])
    block = line.take(2)
    assert block.start == 18
    assert opener.untuck() == 14 * UNIT
    assert max(size for _, size in line.holes()) == 14
    assert kept.start == 0
