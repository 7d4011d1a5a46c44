"""Proof: whether a recipe gives the bytes that it should, found out by running it where it will run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from torchlms.eager.backward_thread import run_as_backward
from torchlms.eager.slot import Where
from torchlms.eager.tensors import whole
from torchlms.errors import LMSError, ReplayFailed

if TYPE_CHECKING:
    from torchlms.eager.engine import Engine
    from torchlms.eager.recipe import Recipe
    from torchlms.eager.slot import Slot

log = logging.getLogger("torchlms")

_COMPARED_BYTES = 32 << 20  # at a time


class Prover:
    """Tries recipes on the bytes that they are to replace."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.busy = False  # with recipes that no dropped value has yet, or has no more
        self.tried = False  # since this was last looked at; trying takes moves that no plan foresaw

    def prove(self, slot: Slot, recipe: Recipe) -> bool | None:
        """Whether ``recipe`` gives the bytes that ``slot`` has now; None if that could not be found out.

        What it is made from and was gone comes back for it, and goes again.
        """
        self.tried = self.busy = True
        try:
            return self._try(slot, recipe)
        finally:
            self.busy = False

    def _try(self, slot: Slot, recipe: Recipe) -> bool | None:
        engine, device = self._engine, self._engine.device.torch_device
        gone = [
            (other, other.recipe) for other in engine.living() if other.where in (Where.DROPPED, Where.AWAY)
        ]
        try:
            again = run_as_backward(device, lambda: engine.replay(recipe)).untyped_storage()
            return self._same_bytes(slot.take(), again)
        except ReplayFailed as error:
            log.debug("a recipe cannot be carried out: %s", error)
            return False
        except (LMSError, torch.OutOfMemoryError) as error:
            log.debug("a recipe could not be tried: %s", error)
            return None
        finally:
            for other, its_recipe in gone:
                if other.where is Where.HELD and other.alone():
                    self._let_go(other, its_recipe)

    def _let_go(self, slot: Slot, recipe: Recipe | None) -> None:
        if recipe is not None:
            slot.drop(recipe)
        else:
            slot.send(self._engine.store.place(slot.size_bytes))
            slot.release()

    def _same_bytes(self, left: torch.UntypedStorage, right: torch.UntypedStorage) -> bool:
        """Compared piece by piece, which takes next to no memory."""
        if left.nbytes() != right.nbytes():
            return False
        if self._engine.device.is_cuda:
            self._engine.ladder.reserve((_COMPARED_BYTES,))
        pieces = zip(whole(left).split(_COMPARED_BYTES), whole(right).split(_COMPARED_BYTES), strict=True)
        return all(bool(torch.equal(one, other)) for one, other in pieces)
