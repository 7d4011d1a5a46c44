"""Slot: the bytes of one storage that autograd saved, wherever they are.

[Note: A value leaves only when nobody else holds it]
Plain autograd saves references: every saver of a storage sees its bytes as they are at backward.
So all savers of one storage share one slot, and its bytes leave the device only while no tensor
but the slot's own refers to the storage (``alone``). Then nobody can write to it behind our back,
declared or not, and letting go of it frees memory for certain. The link from storage to slot lives
in the storage's own Python object, which dies with it: an address is never a key.

States, and what is held in each:

    HELD      device bytes; once sent also ``place`` and the copy out
    AWAY      ``place``, and what is ``emptied``
    DROPPED   ``recipe`` only
    COMING    device bytes with a copy in in flight, and ``place``

[Note: What the program holds]
Rule ``held`` makes the one exception: a slot that is ``lent`` leaves although the program holds its
storage, which stays with the program, emptied. It is filled again before any op touches it (lent.py).
"""

from __future__ import annotations

import contextlib
import os
import weakref
from enum import Enum
from typing import TYPE_CHECKING

import torch

from torchlms.eager.history import mark
from torchlms.eager.orphans import Bereft, Orphan, refill
from torchlms.eager.private import hide_from_compiler, others_hold, storage_object_held
from torchlms.eager.tensors import whole
from torchlms.errors import ReplayFailed, SpillError

if TYPE_CHECKING:
    from torchlms.eager.history import Cell
    from torchlms.eager.owner import SlotOwner
    from torchlms.eager.recipe import Recipe
    from torchlms.memory.device import Copy
    from torchlms.memory.store import Place

_MARK = "_torchlms_slot"
UNUSED = -2


class Where(Enum):
    HELD = "held"
    AWAY = "away"
    COMING = "coming"
    DROPPED = "dropped"


class Slot:
    """Created when a storage is first saved, gone when its last saver is."""

    __slots__ = (
        "__weakref__",
        "_held",
        "_whole",
        "cell",
        "copy_in",
        "copy_out",
        "emptied",
        "indices",
        "lent",
        "ordinal",
        "owner",
        "passing",
        "pid",
        "place",
        "recipe",
        "saved",
        "size_bytes",
        "used_at",
        "used_in",
        "value",
        "where",
    )

    def __init__(self, owner: SlotOwner, tensor: torch.Tensor, ordinal: int = -1) -> None:
        """A slot for the storage of ``tensor``."""
        storage = tensor.untyped_storage()
        self.owner = owner
        self.ordinal = ordinal  # among the saved storages of its micro-step
        self.saved = ordinal >= 0  # by autograd, and not only held for a recipe
        self._held: torch.Tensor | None = tensor.detach()
        self._whole = False  # a view of all bytes is made when somebody asks for one, and few do
        self.size_bytes = int(storage.nbytes())
        # Lengths and places: torch's own code keeps their address from one op to the next (packed sequences).
        self.indices = tensor.dtype in (torch.int32, torch.int64)
        self.where = Where.HELD
        self.place: Place | None = None
        self.copy_out: Copy | None = None
        self.copy_in: Copy | None = None
        self.value = -1  # the tape's id, while recording
        self.cell: Cell | None = None  # where its provenance is told, if anybody keeps it
        self.recipe: Recipe | None = None
        self.passing = False  # made for each that is made from it, and let go of again
        self.lent = False  # leaving, or gone, while the program holds the storage
        self.emptied: torch.Tensor | None = None  # on the storage that the program was left with
        self.used_at = UNUSED  # the op before which autograd asked for it last
        self.used_in = UNUSED  # and the backward pass that did
        self.pid = os.getpid()  # last: with it the slot is whole
        link(storage, self)

    @property
    def bytes(self) -> torch.Tensor | None:
        """All bytes of the storage, as uint8; None while they are not on the device."""
        if self._held is not None and not self._whole:
            self._held = whole(self._held.untyped_storage())
            self._whole = True
        return self._held

    @bytes.setter
    def bytes(self, found: torch.Tensor | None) -> None:
        self._held = found
        self._whole = True

    def alone(self) -> bool:
        """Whether nobody but this slot holds the storage, so that its bytes may leave."""
        held = self._held
        return (
            self.where is Where.HELD
            and held is not None
            and not others_hold(held.untyped_storage(), ours=1)
            and not storage_object_held(held)
        )

    def lendable(self) -> bool:
        """Whether only tensors hold the storage, so that it can be emptied under them; not where the program
        has resized it itself."""
        held = self._held
        return (
            self.where is Where.HELD
            and held is not None
            and not self.indices
            and held.untyped_storage().nbytes() == self.size_bytes
            and can_be_emptied(held)
        )

    def given_away(self) -> bool:
        """Whether numpy or another process has the memory, too, and may write to it unseen."""
        return self._held is not None and not self._held.untyped_storage().resizable()

    def held(self) -> torch.Tensor:
        """A tensor in the storage, of whatever kind; needs device bytes."""
        assert self._held is not None
        return self._held

    def storage(self) -> torch.UntypedStorage:
        """Where the bytes lie; needs device bytes."""
        return self.held().untyped_storage()

    def let_go(self) -> bool:
        """Whether the program has let go of the storage, be it emptied or not."""
        if self.emptied is None:
            return self.alone()
        return not others_hold(self.emptied.untyped_storage(), ours=1)

    def at_rest(self) -> bool:
        """Whether the bytes could be anywhere else on the device just as well."""
        return self.place is None and self.copy_out is None and self.alone()

    def move_to(self, target: torch.Tensor) -> None:
        """Copy the bytes to ``target``, on the compute queue, and live there; needs ``at_rest``."""
        assert self.bytes is not None
        target.copy_(self.bytes)
        self.bytes = target
        link(target.untyped_storage(), self)
        self.owner.moved(self)

    # -- out ---------------------------------------------------------------------------------

    def lend(self) -> None:
        """From here on the slot may leave although the program holds it; needs ``lendable``."""
        self.lent = True
        self.owner.lends(self)

    def send(self, place: Place) -> None:
        """Start the copy out to ``place``; the device bytes stay until ``release``."""
        assert self.bytes is not None
        try:
            self.copy_out = self.owner.start_out(self.bytes, place)
        except BaseException:
            place.free()
            raise
        self.place = place

    def release(self) -> None:
        """Let the device bytes go once the copy out has passed; needs ``send`` before.

        Where the copy has failed they stay, and the error says so. They also stay where the program has given
        away more than tensors since the slot was lent.
        """
        assert self.place is not None
        assert self.copy_out is not None
        if self.lent and not self.alone() and not self.lendable():
            self.stay()
            return
        try:
            self.copy_out.wait()
        except SpillError:
            self.stay()
            raise
        self._leave()

    def _leave(self) -> None:
        """Let the device bytes go; what lies in ``place`` is the value from here on."""
        self.owner.leaving(self)
        held = self._held
        assert held is not None
        lent = self.lent and others_hold(held.untyped_storage(), ours=1)
        self.emptied = held if lent else None
        self.where = Where.AWAY  # before the bytes go: an interrupt may come in between
        self.bytes = None
        if lent:  # last: whatever interrupts us, the bytes come back in this storage
            self._empty(held)
        self.owner.moved(self)

    # -- back --------------------------------------------------------------------------------

    def fetch(self, *, early: bool = False) -> None:
        """Allocate device bytes and start the copy in; ``early``: before anybody needs them."""
        assert self.where is Where.AWAY
        assert self.place is not None
        target, emptied = self._room(early=early), self.emptied
        try:
            self.copy_in = self.owner.start_in(self.place, target, self.copy_out)
            self.emptied = None
            self.bytes = target
            self.where = Where.COMING
        except BaseException:  # an interrupt, too, while the copy writes to what is about to be given up
            self.owner.finish_copies()
            self._be_away(emptied)
            raise
        link(target.untyped_storage(), self)
        self.owner.moved(self)

    def _be_away(self, emptied: torch.Tensor | None) -> None:
        """As if no copy back had begun."""
        self.where = Where.AWAY
        self.copy_in = self.bytes = None
        self.emptied = emptied
        if emptied is not None:
            self._empty(emptied)

    def _empty(self, tensor: torch.Tensor) -> None:
        """Leave the program a storage without bytes."""
        tensor.untyped_storage().resize_(0)
        self.owner.resized(tensor)

    def _room(self, *, early: bool) -> torch.Tensor:
        """Device memory to come back to: the storage that the program was left with, if it still has it."""
        if self.emptied is None or self.let_go():
            return self.owner.allocate(self.size_bytes, early=early)
        return refill(self.owner, self.emptied.untyped_storage(), self.size_bytes, early=early)

    def drop(self, recipe: Recipe) -> None:
        """Let the device bytes go: ``recipe`` makes them again. Needs ``alone``, and no copy elsewhere."""
        self.owner.leaving(self)
        self.recipe = recipe
        recipe.read_by(self)
        self.where = Where.DROPPED  # before the bytes go: an interrupt may come in between
        self.owner.moved(self)
        self.bytes = None

    def _remake(self) -> None:
        """Make the bytes again; what they are made from and was dropped itself, before."""
        staying = [source for source in _dropped_before(self) if not source.passing]
        for slot in (*staying, self):
            if slot.where is Where.DROPPED:
                slot._make_with_passing()

    def _make_with_passing(self) -> None:
        """All that is still dropped of what the bytes are made from is made in passing: it goes again."""
        passing: list[tuple[Slot, Recipe]] = []
        try:
            for source in _dropped_before(self):
                assert source.recipe is not None
                recipe = source.recipe
                source._make()
                passing.append((source, recipe))
            self._make()
        finally:
            for source, recipe in reversed(passing):
                if source.place is None and source.alone():  # and not evicted meanwhile
                    source.drop(recipe)

    def _make(self) -> None:
        """Make the bytes again from what is there."""
        assert self.recipe is not None
        made = self.owner.remake(self, self.recipe)
        storage = made.untyped_storage()
        if storage.nbytes() != self.size_bytes:
            raise ReplayFailed(f"{storage.nbytes()} bytes came back for a tensor of {self.size_bytes}")
        self._held, self._whole = made, False
        self.where = Where.HELD
        self.recipe = None
        link(storage, self)
        self.owner.moved(self)
        self.owner.back(self)

    def turn_back(self) -> bool:
        """Give the device bytes of a value that is coming back up again: its copy is still in place. False
        where the program has given away more than tensors since they began to come: they stay."""
        assert self.where is Where.COMING
        assert self._held is not None
        if self.lent and not can_be_emptied(self._held):
            self.take()
            return False
        with contextlib.suppress(SpillError):  # nobody needs these bytes
            self._settle()
        self._give_up_coming()
        return True

    def _give_up_coming(self) -> None:
        self.copy_in = None
        self._leave()

    def take(self) -> torch.UntypedStorage:
        """The storage with the bytes in it, usable by the compute queue from here on."""
        if self.where is not Where.HELD:
            self._come_home()
        # From here on somebody may write to the bytes, so the copy elsewhere is no longer theirs.
        if self.place is not None:
            self._free_place()
        if self.lent:
            self.owner.regained(self)
        return self.storage()

    def _come_home(self) -> None:
        if self.where is Where.DROPPED:
            self._remake()
        if self.where is Where.AWAY:
            self.fetch()
        if self.where is Where.COMING:
            try:
                self._settle()
            except SpillError:
                self._give_up_coming()  # what is in its place may still be good
                raise
            self.copy_out = None
            self.where = Where.HELD
            self.owner.back(self)

    def stay(self) -> None:
        """Be on the device and nowhere else: what was copied elsewhere is not wanted any more."""
        assert self.where is Where.HELD
        copy, self.copy_out = self.copy_out, None
        if copy is not None:
            with contextlib.suppress(SpillError):
                copy.wait()
        self._free_place()
        if self.lent:
            self.owner.regained(self)

    def _settle(self) -> None:
        """Order the compute queue after every copy that still touches the device bytes."""
        if self.copy_out is not None:
            self.copy_out.wait()
        if self.copy_in is not None:
            self.copy_in.wait()
            self.copy_in = None

    def _free_place(self) -> None:
        if self.place is not None:
            self.place.free()
            self.place = None

    def _waited_for(self) -> torch.Tensor | None:
        """A tensor on the storage in which the program, as far as it knows, has the bytes that are away."""
        mine = self._held if self.where is Where.COMING else self.emptied
        if mine is None or not self.lent or not others_hold(mine.untyped_storage(), ours=1):
            return None
        return mine

    def __del__(self) -> None:
        if getattr(self, "pid", -1) != os.getpid():
            return  # a forked child owns neither the device bytes nor the places; or never made whole
        waiting = self._waited_for()
        self.owner.forget(self)
        if waiting is not None and self.place is not None:
            out, back = self.copy_out, self.copy_in
            self.owner.adopt(Bereft(self.owner, waiting, self.size_bytes, self.place, out, back))
        elif self._held is not None and (self.copy_out is not None or self.copy_in is not None):
            self.owner.adopt(Orphan(self._held, self.copy_out, self.copy_in, self.place))
        else:
            self._free_place()


hide_from_compiler(Slot.__del__)


def _dropped_before(last: Slot) -> list[Slot]:
    """The dropped values that ``last`` is made from, each after those that it is made from itself: in a loop,
    for a chain of them may be longer than Python's stack is deep."""
    order: list[Slot] = []
    met: set[int] = set()
    waiting = [(last, False)]
    while waiting:
        slot, ready = waiting.pop()
        if ready:
            order.append(slot)
        elif slot.recipe is not None and id(slot) not in met:
            met.add(id(slot))
            waiting.append((slot, True))
            dropped = [found for found in slot.recipe.slots.values() if found[1].recipe is not None]
            dropped.sort(key=lambda found: found[0].history[0].serial, reverse=True)
            waiting.extend((source, False) for _, source in dropped)  # of which the first made comes first
    return order[:-1]


def can_be_emptied(tensor: torch.Tensor) -> bool:
    """Whether nothing but tensors is known to hold the storage of ``tensor``. PyTorch forbids to resize one
    whose memory it has given to numpy or to another process; of DLPack nothing is known."""
    return tensor.untyped_storage().resizable() and not storage_object_held(tensor)


def link(storage: torch.UntypedStorage, slot: Slot) -> None:
    """Let later savers of ``storage`` find ``slot``. The link holds no reference."""
    setattr(storage, _MARK, weakref.ref(slot))
    if slot.cell is not None:
        mark(storage, slot.cell)


def find(storage: torch.UntypedStorage, owner: SlotOwner) -> Slot | None:
    """The live slot of ``storage`` under ``owner``, if any."""
    mark = getattr(storage, _MARK, None)
    slot: Slot | None = mark() if mark is not None else None
    return slot if slot is not None and slot.owner is owner else None
