"""Provenance: which ops made what is in each storage, in this very step (history.py), and from that how it
can be made again (recipe.py).
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import enable_reentrant_dispatch

from torchlms.core.tape import Kind
from torchlms.eager import private
from torchlms.eager.backends import Backends
from torchlms.eager.history import Call, Cell, Ref, mark, marked, results_of
from torchlms.eager.per_op import PerOp
from torchlms.eager.recipe import Recipe
from torchlms.eager.replayable import may_replay
from torchlms.eager.saved import memoryless_alias
from torchlms.eager.tensors import is_plain
from torchlms.eager.traits import generator_of, seeded
from torchlms.eager.writes import without_statistics, writes_anything, written_tensors

if TYPE_CHECKING:
    from torchlms.eager.slot import Slot

_LAPS = itertools.count(1)  # of all sessions: what one leaves on a storage means nothing to the next
_LASTING = (Kind.PARAMETER, Kind.BUFFER)


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
        self._serial = itertools.count()
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
        generator = generator_of(func, args, kwargs, self._device) if manner.seeded else None
        drawn = (generator, generator.get_state()) if generator is not None else None
        backends, serial = self._backends.state(), next(self._serial)
        return Call(func, refs, named, op, True, drawn, backends, manner.blank, tuple(found), serial)

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keep what a recipe will ask for and nobody else may."""
        for tensor in tensors:
            if self._ours(tensor) and self._cell(tensor).slot is None:
                slot = self._hold(tensor)
                if slot is not None:
                    # Here, below autograd, a detached tensor would count its writes on its own.
                    with enable_reentrant_dispatch(), private.unwatched():
                        alias = memoryless_alias(tensor, self._hollow(tensor.dtype))
                    self.saved(tensor, slot, alias)
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
                self._new_cell(tensor, place, [call])
        if not self._manner(call.func).writes:
            return
        written = [tensor for tensor in written_tensors(call.func, args, kwargs) if self._tracked(tensor)]
        # Of a storage's tensors one that cannot be told of counts for all.
        written.sort(key=lambda tensor: not self._ours(tensor))
        for tensor in {tensor.untyped_storage()._cdata: tensor for tensor in written}.values():
            cell = self._cell(tensor)
            # What lasts must not hold, through its cell, a call that holds it.
            telling = self._ours(tensor) and not cell.lasts
            cell.history.append(call if telling else Call(call.func, (), {}, call.op, False))

    def written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], op: int) -> None:
        """A call that no recipe runs again has ended: what it wrote is no longer what is told of it."""
        if not self._manner(func).writes:
            return
        for tensor in written_tensors(func, args, kwargs):
            if self._tracked(tensor) and self._known(tensor):
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

    def _tracked(self, tensor: torch.Tensor) -> bool:
        """Whether a write to the tensor is to be noted: also one through a view that cannot be told of, such
        as a conjugated one, of a storage with a history."""
        if self._ours(tensor):
            return True
        return tensor.device == self._device and is_plain(tensor) and self._known(tensor)

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
        cell = marked(tensor.untyped_storage())
        if cell is None or cell.lap != self._lap:
            return self._new_cell(tensor, 0, [])
        return cell

    def _new_cell(self, tensor: torch.Tensor, place: int, history: list[Call]) -> Cell:
        value = self.value_of(tensor) if self.value_of is not None else -1
        storage = tensor.untyped_storage()
        self._histories.append(history)
        new = Cell(
            self._lap,
            place,
            first_version=tensor._version,
            made=bool(history),
            lasts=self._kinds(storage) in _LASTING,
            history=history,
            value=value,
            size_bytes=storage.nbytes(),
        )
        old = marked(storage)
        if old is not None:
            # What was dropped in an earlier lap, by a graph that is still there, reads it all the same.
            new.readers = [reader for reader in old.readers or () if reader() is not None]
        mark(storage, new)
        return new

    def _known(self, tensor: torch.Tensor) -> bool:
        cell = marked(tensor.untyped_storage())
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


class _Foreign(Exception):
    """An argument that cannot be told of."""


class _Manner(NamedTuple):
    """What an op is like, as far as telling of it is concerned."""

    followed: bool  # a recipe may run it again
    blank: bool  # what it makes has no bytes of its own yet
    seeded: bool  # draws random numbers
    writes: bool  # may write bytes of its arguments


@functools.cache
def _manners(device_type: str) -> PerOp[_Manner]:
    def manner(func: Any) -> _Manner:
        blank = func in _BLANK
        # It has a tensor lie elsewhere, and writes no byte there nor where it lay.
        lays = getattr(func, "_opname", "") == "set_"
        writes = writes_anything(func) and not lays
        return _Manner(blank or may_replay(func, device_type), blank, seeded(func), writes)

    return PerOp(manner)


# What is no tensor, and holds none.
_SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout))

# What these make holds whatever lay there before.
_BLANK = frozenset(
    overload
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    for packet in (getattr(torch.ops.aten, name),)
    for overload in (getattr(packet, name) for name in packet.overloads())
)
