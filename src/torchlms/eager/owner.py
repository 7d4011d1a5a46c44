"""Owner: what a slot needs of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from torchlms.eager.orphans import Bereft, Orphan
    from torchlms.eager.recipe import Recipe
    from torchlms.eager.slot import Slot
    from torchlms.memory.device import Copy
    from torchlms.memory.store import Place


class SlotOwner:
    """What a slot needs of the engine: memory to come back to, copies, and to be told of its end."""

    def allocate(self, size_bytes: int, *, early: bool = False) -> torch.Tensor:
        """Device memory; ``early``: for a value that may just as well come later."""
        raise NotImplementedError

    def start_out(self, source: torch.Tensor, place: Place) -> Copy:
        raise NotImplementedError

    def start_in(self, place: Place, target: torch.Tensor, after: Copy | None) -> Copy:
        raise NotImplementedError

    def finish_copies(self) -> None:
        """Wait for every copy that was started."""
        raise NotImplementedError

    def remake(self, slot: Slot, recipe: Recipe) -> torch.Tensor:
        """Make the slot's bytes again: a tensor in the storage that has them."""
        raise NotImplementedError

    def leaving(self, slot: Slot) -> None:
        """The slot is about to let its device bytes go."""
        raise NotImplementedError

    def back(self, slot: Slot) -> None:
        """The slot's bytes are there again, ordered into the compute queue, for the first time since."""
        raise NotImplementedError

    def moved(self, slot: Slot) -> None:
        """The slot's bytes now live in another storage than before, or in none."""
        raise NotImplementedError

    def forget(self, slot: Slot) -> None:
        raise NotImplementedError

    def adopt(self, orphan: Orphan | Bereft) -> None:
        """Keep what a slot left behind until it can be waited for."""
        raise NotImplementedError

    def lends(self, slot: Slot) -> None:
        """The slot begins to leave while the program holds its storage."""
        raise NotImplementedError

    def regained(self, slot: Slot) -> None:
        """The slot is no longer lent."""
        raise NotImplementedError

    def resized(self, tensor: torch.Tensor) -> None:
        """The storage of ``tensor`` has been emptied, or filled again."""
        raise NotImplementedError
