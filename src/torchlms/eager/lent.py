"""Lent: values that are away, or on their way out, while the program itself holds them.

[Note: Emptied under the program]
The program is left with the same storage, without bytes. Every op of the thread comes by here first, and
what it is about to touch is filled again in the same storage, so that all tensors that share it see the
bytes. What reads a tensor in another way than by an op (its address, a kernel of one's own, ``torch.save``)
would see nothing: that is why rule ``held`` has to be asked for.
"""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from torchlms.eager.slot import Slot, Where, find
from torchlms.eager.tensors import all_plain, tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from torchlms.eager.orphans import Bereft
    from torchlms.eager.owner import SlotOwner

_MARK = "_torchlms_made_in"
_NUMBERS = itertools.count()  # of sessions: what one leaves on a storage means nothing to the next

Operands = tuple[tuple[Any, ...], dict[str, Any]]


class Lent:
    """The lent slots of one owner, and what was left behind by those that are dead."""

    def __init__(self, owner: SlotOwner) -> None:
        self._owner = owner
        self._slots: dict[int, weakref.ref[Slot]] = {}
        self._bereft: dict[int, Bereft] = {}  # by the storage, which each of them keeps alive
        # Whether there may be any: asked for at each op, and so no method. It is taken back only by whoever
        # runs ops, for a slot may die in any thread.
        self.any = False
        self._number = next(_NUMBERS)
        self.operands: Operands | None = None  # of the op that something comes back for just now
        self.late = 0  # times that an op touched what was still away

    def __bool__(self) -> bool:
        return bool(self._slots or self._bereft)

    def add(self, slot: Slot) -> None:
        self._slots[id(slot)] = weakref.ref(slot)
        self.any = True

    def discard(self, slot: Slot) -> None:
        slot.lent = False
        self._slots.pop(id(slot), None)

    def keep(self, bereft: Bereft) -> None:
        """Keep what a slot has left behind, until the program touches it or lets go of it."""
        self._bereft[_name(bereft.emptied)] = bereft
        self.any = True

    def note_made(self, result: Any, step: int) -> None:
        """An op of the forward pass of ``step`` has made ``result``."""
        for tensor in tensors_in((result,), {}):
            storage = tensor.untyped_storage()
            made_by = getattr(storage, _MARK, None)
            if made_by is None or made_by[0] != self._number:
                setattr(storage, _MARK, (self._number, step))

    def made_in(self, slot: Slot, step: int) -> bool:
        """Whether an op of the forward pass of ``step`` is known to have made what ``slot`` has."""
        return slot.where is Where.HELD and getattr(slot.storage(), _MARK, None) == (self._number, step)

    def touch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have whole again what an op is about to read or write."""
        self._forget_let_go()
        if not self:
            return
        if not all_plain(args, kwargs):
            self.recall()  # which of them the op reads inside of another tensor, nobody tells
            return
        self.operands = args, kwargs
        try:
            for tensor in tensors_in(args, kwargs):
                self._have_whole(tensor)
        finally:
            self.operands = None

    def recall(self) -> None:
        """Have all of them whole again: no more ops will come by, or one reads nobody knows what.

        Where one cannot be had, the others still are; the error is the first.
        """
        self._forget_let_go()
        errors = [tried(partial(_recall, slot)) for slot in self._living()]
        errors += [tried(partial(self._fill, name)) for name in list(self._bereft)]
        for error in filter(None, errors):
            raise error

    def _have_whole(self, tensor: torch.Tensor) -> None:
        slot = find(tensor.untyped_storage(), self._owner)
        if slot is not None and slot.lent:
            self.late += slot.where is Where.AWAY
            _recall(slot)
        elif _name(tensor) in self._bereft:
            self.late += 1
            self._fill(_name(tensor))

    def _fill(self, name: int) -> None:
        self._bereft[name].fill()  # where that raises, the next op that touches it tries again
        del self._bereft[name]

    def _living(self) -> Iterator[Slot]:
        for reference in list(self._slots.values()):
            slot = reference()
            if slot is not None:
                yield slot

    def _forget_let_go(self) -> None:
        """What the program has let go of meanwhile is away like any other."""
        for slot in self._living():
            if slot.let_go():
                slot.emptied = None
                self.discard(slot)
        for name, bereft in list(self._bereft.items()):
            if bereft.let_go():
                del self._bereft[name]
                bereft.forgo()
        self.any = False  # before one looks: what is lent meanwhile says so again
        if self:
            self.any = True


def _recall(slot: Slot) -> None:
    if slot.where is Where.HELD:
        slot.stay()  # the op may write to it: what was copied is not the value any more
    else:
        slot.take()


def tried(act: Callable[[], object]) -> Exception | None:
    """The error that ``act`` led to, where there is more to be brought home."""
    try:
        act()
    except Exception as error:
        return error
    return None


def _name(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
