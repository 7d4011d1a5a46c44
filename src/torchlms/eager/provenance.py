"""Provenance: which ops made what is in each storage, in this very step.

[Note: Cells and calls]
A storage has a cell: the history of the calls that wrote it, first the one that made it, then those
that changed it in place. A call remembers its arguments, with each tensor replaced by where it lay:
in which cell, after how many writes, and as which view. Cells hold no device memory. A storage holds
its cell, a cell its calls, a call the cells it read: what nobody can ask for any more goes by itself.

A recipe is such a history followed back to sources: storages that autograd saved and that are whole
(slots), and tensors that outlast the step (parameters, buffers). Only ops that a sweep has shown to
give the same bits again are followed (``may_replay``); at any other op the history just begins anew.

Where the way back ends at a storage that autograd did not save, such as the sum that a norm reads, the
recipe asks for it: the tape names it as a source, and in the steps that follow a plan it is held, as a
slot that only recipes refer to. Of all the places where the way could be cut, the one with the fewest
bytes is taken.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from torchlms.core.tape import Kind
from torchlms.eager.backends import Backends
from torchlms.eager.per_op import PerOp
from torchlms.eager.replayable import may_replay
from torchlms.eager.saved import memoryless_alias
from torchlms.eager.tensors import is_plain
from torchlms.eager.traits import generator_of, seeded
from torchlms.eager.writes import without_statistics, writes_anything, written_tensors

if TYPE_CHECKING:
    from torchlms.eager.backends import State
    from torchlms.eager.slot import Slot

_MARK = "_torchlms_cell"
_LAPS = itertools.count(1)  # of all sessions: what one leaves on a storage means nothing to the next
_LASTING = (Kind.PARAMETER, Kind.BUFFER)
_MOST_CALLS = 32  # a longer recipe is not worth following


@dataclass(slots=True, eq=False)
class Cell:
    """One storage's history in one lap of the program."""

    lap: int
    place: int = 0  # among the results of the call that made it
    first_version: int = 0  # before the first write
    made: bool = False  # the history begins with the call that made it
    lasts: bool = False  # a parameter's or a buffer's
    history: list[Call] = field(default_factory=list)
    slot: weakref.ref[Slot] | None = None
    saved_version: int = -1  # of the tensor that autograd saved last
    counter: torch.Tensor | None = None  # shares that tensor's version, and holds none of its memory
    value: int = -1  # the tape's id while recording, if the storage could be held
    size_bytes: int = 0
    readers: list[weakref.ref[Slot]] | None = None  # dropped, and made from this

    def accounts_for(self, writes: int, version: int) -> bool:
        """Whether the first ``writes`` calls are all that has happened until ``version``. A write from
        another thread or a compiled region is told of by the version alone."""
        return version - self.first_version == writes - 1


@dataclass(slots=True, eq=False)  # not frozen, which takes as long again to make
class Ref:
    """A tensor argument: the view ``shape, strides, offset`` of a cell after ``writes`` writes."""

    cell: Cell
    writes: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    version: int
    lasting: torch.Tensor | None = None  # a parameter or buffer: here to stay
    storage: torch.UntypedStorage | None = None  # where it lay, should the program give it another one


@dataclass(slots=True, eq=False)
class Call:
    """One op that ran."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    op: int  # its place on the tape
    replayable: bool
    drawn: tuple[torch.Generator, torch.Tensor] | None = None  # from which generator, in which state
    backends: State = ()  # how the switches stood that choose its kernel
    blank: bool = False  # what it makes has no bytes of its own yet
    refs: tuple[Ref, ...] = ()  # all that are among the arguments


class _Foreign(Exception):
    """An argument that cannot be told of."""


class _Manner(NamedTuple):
    """What an op is like, as far as telling of it is concerned."""

    followed: bool  # a recipe may run it again
    blank: bool  # what it makes has no bytes of its own yet
    seeded: bool  # draws random numbers
    writes: bool  # may write some of its arguments


@functools.cache
def _manners(device_type: str) -> PerOp[_Manner]:
    def manner(func: Any) -> _Manner:
        blank = _is_blank(func)
        return _Manner(blank or may_replay(func, device_type), blank, seeded(func), writes_anything(func))

    return PerOp(manner)


# What is no tensor, and holds none.
_SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout))


class Provenance:
    """Watches the ops of one lap, outside backward passes."""

    def __init__(
        self,
        *,
        device: torch.device,
        kinds: Callable[[torch.UntypedStorage], Kind | None],
        hold: Callable[[torch.Tensor], Slot | None],
        hollow: Callable[[torch.dtype], torch.Tensor],
    ) -> None:
        self._lap = next(_LAPS)
        self._device = device
        self._manner = _manners(device.type)
        self._kinds = kinds
        self._hold = hold
        self._hollow = hollow
        self._backends = Backends(device.type)
        self._histories: list[list[Call]] = []
        self._held: list[Slot] = []  # until they are dropped values' sources, or backward begins
        self.value_of: Callable[[torch.Tensor], int] | None = None  # while a tape is written

    # -- capture -----------------------------------------------------------------------------

    def before(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], op: int, *, forward: bool = True
    ) -> Call:
        """What is about to be called, with its arguments as they are now."""
        manner = self._manner(func)
        if not forward or not manner.followed:
            return Call(func, (), {}, op, False)
        found: list[Ref] = []
        try:
            told = without_statistics(func, args) if manner.writes else args
            refs = tuple([self._refs(item, found) for item in told])
            named = self._refs(kwargs, found) if kwargs else {}
        except _Foreign:
            return Call(func, (), {}, op, False)
        generator = generator_of(func, (), kwargs, self._device) if manner.seeded else None
        drawn = (generator, generator.get_state()) if generator is not None else None
        return Call(func, refs, named, op, True, drawn, self._backends.state(), manner.blank, tuple(found))

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keep what a recipe will ask for and nobody else may."""
        for tensor in tensors:
            if self._ours(tensor) and self._cell(tensor).slot is None:
                slot = self._hold(tensor)
                if slot is not None:
                    self.saved(tensor, slot, memoryless_alias(tensor, self._hollow(tensor.dtype)))
                    self._held.append(slot)

    def release(self) -> None:
        """What is still needed is held by recipes from here on."""
        self._held.clear()

    def forget(self) -> None:
        """The lap is over and no recipe of it is left: what the program keeps of it need not know its
        history, which would keep the histories of all that it was made from."""
        for history in self._histories:
            history.clear()
        self._histories.clear()

    def after(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """The call ended: its results have a history, and what it wrote has one more entry."""
        for place, tensor in enumerate(results_of(result)):
            # What is known already is a view, or was written.
            if tensor is not None and self._ours(tensor) and not self._known(tensor):
                mark(tensor.untyped_storage(), self._new_cell(tensor, place, [call]))
        if not self._manner(call.func).writes:
            return
        written = [tensor for tensor in written_tensors(call.func, args, kwargs) if self._ours(tensor)]
        for tensor in {tensor.untyped_storage()._cdata: tensor for tensor in written}.values():
            cell = self._cell(tensor)
            # What lasts must not hold, through its cell, a call that holds it.
            told = Call(call.func, (), {}, call.op, False) if cell.lasts else call
            cell.history.append(told)

    def written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], op: int) -> None:
        """A call that no recipe runs again has ended: what it wrote is no longer what is told of it."""
        for tensor in written_tensors(func, args, kwargs):
            if self._ours(tensor) and self._known(tensor):
                self._cell(tensor).history.append(Call(func, (), {}, op, False))

    def saved(self, tensor: torch.Tensor, slot: Slot, alias: torch.Tensor) -> None:
        """Autograd saved ``tensor``: from now on the bytes of its storage can be had from ``slot``. ``alias``
        shares the tensor's version counter, and holds none of its memory."""
        cell = slot.cell = self._cell(tensor)
        cell.slot = weakref.ref(slot)
        cell.saved_version = tensor._version
        cell.counter = alias

    def _refs(self, item: Any, found: list[Ref]) -> Any:
        """``item`` with a reference in place of each tensor, which also goes to ``found``."""
        if type(item) in _SIMPLE:
            return item
        if isinstance(item, torch.Tensor):
            if self._ours(item):
                ref = self._ref(item)
                found.append(ref)
                return ref
            if item.device == self._device or item.numel() > 1:
                raise _Foreign
            return item.clone()  # a number
        if type(item) in (list, tuple):
            return type(item)([self._refs(part, found) for part in item])
        if type(item) is dict:
            return {name: self._refs(part, found) for name, part in item.items()}
        return item

    def _ours(self, tensor: torch.Tensor) -> bool:
        if tensor.device != self._device or not is_plain(tensor):
            return False
        return not (tensor.is_inference() or tensor.is_conj() or tensor.is_neg())

    def _ref(self, tensor: torch.Tensor) -> Ref:
        cell = self._cell(tensor)
        return Ref(
            cell,
            len(cell.history),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor._version,
            tensor if cell.lasts else None,
            tensor.untyped_storage() if cell.lasts else None,
        )

    def _cell(self, tensor: torch.Tensor) -> Cell:
        """The cell of the tensor's storage; a new one, without a history, for what is older than this lap."""
        storage = tensor.untyped_storage()
        cell: Cell | None = getattr(storage, _MARK, None)
        if cell is None or cell.lap != self._lap:
            new = self._new_cell(tensor, 0, [])
            if cell is not None:
                # What was dropped in an earlier lap, by a graph that is still there, reads it all the same.
                new.readers = [reader for reader in cell.readers or () if reader() is not None]
            mark(storage, new)
            return new
        return cell

    def _new_cell(self, tensor: torch.Tensor, place: int, history: list[Call]) -> Cell:
        value = self.value_of(tensor) if self.value_of is not None else -1
        storage = tensor.untyped_storage()
        self._histories.append(history)
        return Cell(
            self._lap,
            place,
            first_version=tensor._version,
            made=bool(history),
            lasts=self._kinds(storage) in _LASTING,
            history=history,
            value=value,
            size_bytes=storage.nbytes(),
        )

    def _known(self, tensor: torch.Tensor) -> bool:
        cell: Cell | None = getattr(tensor.untyped_storage(), _MARK, None)
        return cell is not None and cell.lap == self._lap

    # -- recipes -----------------------------------------------------------------------------

    def recipe(self, slot: Slot) -> Recipe | None:
        """How to make the slot's bytes again, or None if that cannot be done from what there is."""
        cell = slot.cell
        if cell is None or cell.lap != self._lap or not cell.made:
            return None
        if cell.counter is not None and not cell.accounts_for(len(cell.history), cell.counter._version):
            return None
        recipe = Recipe(cell, len(cell.history), self._device.type)
        return recipe if recipe.follow(cell, len(cell.history), target=slot) else None


@dataclass(slots=True, eq=False)
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
    _cut: set[int] = field(default_factory=set)  # where the way back has been found dearer than holding

    def follow(self, cell: Cell, writes: int, *, target: Slot | None) -> bool:
        """Note all that is needed for ``cell`` after ``writes`` writes; False where the way is barred."""
        if not writes or not cell.made:
            return False
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
            self.lasting[id(ref.cell)] = ref
            return True
        slot = ref.cell.slot() if ref.cell.slot is not None else None
        # A write that the mode did not see, from another thread or a compiled region, still counts.
        whole = ref.writes == len(ref.cell.history) and ref.version == ref.cell.saved_version
        if slot is not None and slot is not target and whole:
            self.slots[id(ref.cell)] = (ref.cell, slot)
            return True
        return self._follow_or_ask(ref, target)

    def _follow_or_ask(self, ref: Ref, target: Slot | None) -> bool:
        """Follow ``ref`` further back, or ask for it: whichever holds fewer bytes, and nothing dear is
        done again where holding would gain something."""
        cell = ref.cell
        can_ask = cell.value >= 0 and cell.slot is None and ref.writes == len(cell.history)
        before, dear, asked_bytes = self._lengths(), self.dear, self.asked_bytes
        known = cell.accounts_for(ref.writes, ref.version)
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
        return len(self.calls), len(self.slots), len(self.lasting), len(self.asked)

    def _undo(self, lengths: tuple[int, ...]) -> None:
        notes: tuple[dict[int, Any], ...] = (self.calls, self.slots, self.lasting, self.asked)
        for noted, length in zip(notes, lengths, strict=True):
            while len(noted) > length:
                noted.popitem()

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

    def read_by(self, slot: Slot) -> None:
        """Have writes to any source heard of by ``slot``, which is dropped and will need it."""
        reader = weakref.ref(slot)
        cells = [cell for cell, _ in self.slots.values()] + [ref.cell for ref in self.lasting.values()]
        for cell in cells:
            if cell.readers is None:
                cell.readers = []
            cell.readers.append(reader)


def mark(storage: torch.UntypedStorage, cell: Cell) -> None:
    """The bytes that ``cell`` tells of now lie in ``storage``."""
    setattr(storage, _MARK, cell)


def results_of(result: Any) -> list[torch.Tensor | None]:
    """What an op returned, flat; None for what is no tensor."""
    if isinstance(result, (list, tuple)):
        return [found for part in result for found in results_of(part)]
    return [result if isinstance(result, torch.Tensor) else None]


_DEAR = frozenset(
    ("convolution", "mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "linear", "attention", "trilinear")
)


def _is_dear(func: Any) -> bool:
    return not _DEAR.isdisjoint(str(getattr(func, "_opname", func)).split("_"))


# Whether an op computes far longer than it reads and writes.
is_dear = PerOp(_is_dear)


# What these make holds whatever lay there before.
_BLANK = frozenset(
    overload
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    for packet in (getattr(torch.ops.aten, name),)
    for overload in (getattr(packet, name) for name in packet.overloads())
)
_is_blank = PerOp(_BLANK.__contains__)
# And these write every element of their first argument, whatever was there.
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


def readers_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Slot]:
    """The dropped slots whose recipe reads something that ``func`` is about to write."""
    found: list[Slot] = []
    for tensor in written_tensors(func, args, kwargs):
        if is_plain(tensor):
            cell: Cell | None = getattr(tensor.untyped_storage(), _MARK, None)
            if cell is not None and cell.readers:
                found += [slot for reader in cell.readers if (slot := reader()) is not None]
    return found
