"""Orphans: what is left of a slot that dies while a copy flies, or while the program waits for its bytes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from torchlms.eager.private import others_hold
from torchlms.eager.tensors import whole
from torchlms.errors import SpillError

if TYPE_CHECKING:
    import torch

    from torchlms.eager.owner import SlotOwner
    from torchlms.memory.device import Copy
    from torchlms.memory.store import Place


class Orphan:
    """What a slot leaves behind when it dies with a copy in flight.

    The collector may run a finalizer in any thread, at any moment, holding any lock: no place to wait
    for a copy. The bytes stay alive here until the engine comes by.
    """

    __slots__ = ("bytes", "copies", "place")

    def __init__(
        self, bytes_: torch.Tensor, out: Copy | None, back: Copy | None, place: Place | None
    ) -> None:
        self.bytes: torch.Tensor | None = bytes_
        self.copies = [copy for copy in (out, back) if copy is not None]
        self.place = place

    def bury(self) -> None:
        """Wait for the copies, then let go of the bytes and the place."""
        try:
            for copy in self.copies:
                with contextlib.suppress(SpillError):  # nobody misses what did not reach the disk
                    copy.wait()
        finally:
            self.bytes = None
            if self.place is not None:
                self.place.free()


class Bereft:
    """What a slot leaves behind when it dies and the program still holds the storage that was emptied: its
    bytes stay where they are until somebody touches them."""

    __slots__ = ("copy_in", "copy_out", "emptied", "owner", "place", "size_bytes")

    def __init__(
        self,
        owner: SlotOwner,
        emptied: torch.Tensor,
        size_bytes: int,
        place: Place,
        out: Copy | None,
        back: Copy | None,
    ) -> None:
        self.owner = owner
        self.emptied = emptied
        self.size_bytes = size_bytes
        self.place = place
        self.copy_out = out
        self.copy_in = back  # under way when the slot died

    def let_go(self) -> bool:
        """Whether nobody wants the bytes any more."""
        return not others_hold(self.emptied.untyped_storage(), ours=1)

    def fill(self) -> None:
        """Have the bytes in the storage again; a copy that was under way and has failed is made once more."""
        if not self._came():
            target = refill(self.owner, self.emptied.untyped_storage(), self.size_bytes)
            self.owner.start_in(self.place, target, self.copy_out).wait()
        self.place.free()

    def forgo(self) -> None:
        """Let go of storage and place."""
        self._came()
        self.place.free()

    def _came(self) -> bool:
        """Wait for the copy that was under way; whether there was one, and it has brought the bytes."""
        copy, self.copy_in = self.copy_in, None
        try:
            if copy is not None:
                copy.wait()
        except SpillError:
            return False
        return copy is not None


def refill(
    owner: SlotOwner, storage: torch.UntypedStorage, size_bytes: int, *, early: bool = False
) -> torch.Tensor:
    """All bytes of ``storage``, which was emptied; room for them is made first."""
    room = owner.allocate(size_bytes, early=early)
    del room
    storage.resize_(size_bytes)
    found = whole(storage)
    owner.resized(found)
    return found
