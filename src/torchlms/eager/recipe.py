"""Recipe: a history followed back to what is there, by which a storage can be made again.

Sources are storages that autograd saved and that are whole (slots), and tensors that outlast the step
(parameters, buffers). Only ops that a sweep has shown to give the same bits again are followed
(``may_replay``); at any other op the history just begins anew.

Where the way back ends at a storage that autograd did not save, such as the sum that a norm reads, the
recipe asks for it: the tape names it as a source, and in the steps that follow a plan it is held, as a
slot that only recipes refer to. Of all the places where the way could be cut, the one with the fewest
bytes is taken.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchlms.eager.history import Ref
from torchlms.eager.per_op import PerOp

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.eager.history import Call, Cell
    from torchlms.eager.slot import Slot

_MOST_CALLS = 32  # a longer recipe is not worth following
_TINY = 1 / 1024  # of what is made: held sooner than made again, which takes the program longer


@dataclass(slots=True, eq=False, repr=False)
class Recipe:
    """A history and its sources, which it keeps alive."""

    cell: Cell
    writes: int
    device_type: str
    calls: dict[int, Call] = field(default_factory=dict)  # by identity, in the order they were followed
    slots: dict[int, tuple[Cell, Slot]] = field(default_factory=dict)  # by the cell's identity
    lasting: dict[int, Ref] = field(default_factory=dict)
    asked: dict[int, Cell] = field(default_factory=dict)  # would have to be held
    dear: int = 0  # calls that take long for the bytes they make
    _made: dict[int, Cell] = field(default_factory=dict)  # by identity, what the calls make
    _cut: set[int] = field(default_factory=set)  # where the way back has been found dearer than holding

    def follow(self, cell: Cell, writes: int, *, target: Slot | None) -> bool:
        """Note all that is needed for ``cell`` after ``writes`` writes; False where the way is barred."""
        if not writes or not cell.made:
            return False
        self._made[id(cell)] = cell
        for call in cell.history[:writes]:
            if id(call) in self.calls:
                continue
            if not call.replayable or len(self.calls) >= _MOST_CALLS:
                return False
            self.dear += is_dear(call.func)
            if call.blank and not _filled(cell, writes):
                return False
            self.calls[id(call)] = call
            for ref in call.refs:
                if not self._find(ref, cell, target):
                    return False
        return True

    def _find(self, ref: Ref, reader: Cell, target: Slot | None) -> bool:
        """Whether ``ref`` can be had when the recipe is carried out."""
        if ref.cell is reader:
            return True  # what an in-place op goes on from
        if ref.lasting is not None:
            if ref.writes != len(ref.cell.history):
                return False  # written since, perhaps through .data, of which no version tells
            self.lasting[id(ref.cell)] = ref
            return True
        slot = ref.cell.slot() if ref.cell.slot is not None else None
        # A write that the mode did not see, from another thread or a compiled region, still counts.
        whole = ref.writes == len(ref.cell.history) and ref.version == ref.cell.saved_version
        # What is made, because an op read it before a write, goes through that write as it did then.
        made = id(ref.cell) in self._made
        if slot is not None and slot is not target and whole and not made and not slot.given_away():
            self.slots[id(ref.cell)] = (ref.cell, slot)
            return True
        return self._follow_or_ask(ref, target)

    def _follow_or_ask(self, ref: Ref, target: Slot | None) -> bool:
        """Follow ``ref`` further back, or ask for it: whichever holds fewer bytes. Nothing dear is done again
        where holding would gain something, and nothing at all for what is tiny beside what is made."""
        cell = ref.cell
        if ref.writes < len(cell.history) and (id(cell) in self.slots or id(cell) in self.asked):
            return False  # it is there as it was later, and cannot be there twice
        can_ask = cell.value >= 0 and cell.slot is None and ref.writes == len(cell.history)
        can_ask = can_ask and id(cell) not in self._made
        before, dear, asked_bytes = self._lengths(), self.dear, self.asked_bytes
        tiny = can_ask and cell.size_bytes <= _TINY * self.cell.size_bytes
        known = not tiny and cell.accounts_for(ref.writes, ref.version)
        if known and id(cell) not in self._cut and self.follow(cell, ref.writes, target=target):
            held_bytes = self.asked_bytes - asked_bytes
            asking_pays = cell.size_bytes < self.cell.size_bytes and self.dear > dear
            if not can_ask or (held_bytes < max(cell.size_bytes, 1) and not asking_pays):
                return True
        if not can_ask:
            return False
        self._undo(before)
        self.dear = dear
        self._cut.add(id(cell))
        self.asked[id(cell)] = cell
        return True

    def _lengths(self) -> tuple[int, ...]:
        return tuple(len(noted) for noted in self._notes)

    def _undo(self, lengths: tuple[int, ...]) -> None:
        for noted, length in zip(self._notes, lengths, strict=True):
            while len(noted) > length:
                noted.popitem()

    @property
    def _notes(self) -> tuple[dict[int, Any], ...]:
        return self.calls, self.slots, self.lasting, self.asked, self._made

    @property
    def asked_bytes(self) -> int:
        """Bytes that would have to be held for it."""
        return sum(cell.size_bytes for cell in self.asked.values())

    @property
    def source_values(self) -> tuple[int, ...]:
        """The tape's ids of what it would be made from, apart from what lasts; -1 for what has none."""
        saved = {slot.value for _, slot in self.slots.values()}
        return tuple(sorted(saved | {cell.value for cell in self.asked.values()}))

    @property
    def ops(self) -> tuple[int, ...]:
        """The places on the tape of the calls that would run again."""
        return tuple(sorted({call.op for call in self.calls.values()}))

    def unwritten_since(self) -> Callable[[], bool]:
        """For whoever asks later whether what the recipe reads was written since; it keeps none of that."""
        cells = [
            *(cell for cell, _ in self.slots.values()),
            *self.asked.values(),
            *(ref.cell for ref in self.lasting.values()),
        ]
        then = [(cell, len(cell.history)) for cell in cells]
        return lambda: all(len(cell.history) == writes for cell, writes in then)

    def read_by(self, slot: Slot) -> None:
        """Have writes to any source heard of by ``slot``, which is dropped and will need it."""
        reader = weakref.ref(slot)
        cells = [cell for cell, _ in self.slots.values()] + [ref.cell for ref in self.lasting.values()]
        for cell in cells:
            if cell.readers is None:
                cell.readers = []
            cell.readers.append(reader)


_DEAR = frozenset(
    ("convolution", "mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "linear", "attention", "trilinear")
)


def _is_dear(func: Any) -> bool:
    return not _DEAR.isdisjoint(str(getattr(func, "_opname", func)).split("_"))


# Whether an op computes far longer than it reads and writes.
is_dear = PerOp(_is_dear)


# These write every element of their first argument, whatever was there.
_FILLS = frozenset(
    ("bernoulli_", "uniform_", "normal_", "exponential_", "log_normal_", "random_", "fill_", "zero_", "copy_")
)


def _filled(cell: Cell, writes: int) -> bool:
    """Whether all of a storage that was made blank is written by the call after that."""
    if writes < 2 or len(cell.history) < 2:
        return False
    filling = cell.history[1]
    target = filling.args[0] if filling.args else None
    if getattr(filling.func, "_opname", "") not in _FILLS or not isinstance(target, Ref):
        return False
    return target.cell is cell and target.shape.numel() * target.dtype.itemsize == cell.size_bytes
