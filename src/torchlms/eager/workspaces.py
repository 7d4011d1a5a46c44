"""Workspaces: sees to it that each convolution finds its own, and speaks up where one did not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchlms.errors import ReplayFailed
from torchlms.memory.limits import format_bytes

if TYPE_CHECKING:
    from torchlms.eager.convolution import ConvolutionRoom
    from torchlms.eager.ladder import Ladder

log = logging.getLogger("torchlms")


class Workspaces:
    """Of the convolution that runs now: what it needs, and whether it was starved.

    It was if an allocation failed inside it, in its thread, of which nobody was told (see
    [Note: Starved convolutions]). ``hidden_ooms`` counts those, in the thread that asks.
    """

    def __init__(
        self,
        rooms: ConvolutionRoom,
        ladder: Ladder,
        hidden_ooms: Callable[[], int],
        where: Callable[[], str],
    ) -> None:
        self._rooms = rooms
        self._ladder = ladder
        self._hidden_ooms = hidden_ooms
        self._where = where
        self._hidden_before = 0  # when room was made
        self._need_bytes = 0
        self._said: set[tuple[Any, str]] = set()  # of which convolutions, and where in the model

    def make_room(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Before the convolution runs. False if its need was only guessed.

        Raises BudgetTooSmall where there is less room than it is known to take, and deterministic kernels
        were asked for.
        """
        blocks, measured = self._rooms.need(func, args, kwargs)
        self._need_bytes = sum(blocks)
        refusing = measured and _deterministic()
        if not self._ladder.reserve(blocks, (args, kwargs), refusing=refusing) and measured:
            self._refuse(func)
        self._hidden_before = self._hidden_ooms()
        return measured

    def look(self, func: Any, args: tuple[Any, ...], *, measured: bool) -> None:
        """After it has run as part of the program. Raises BudgetTooSmall where it was starved, deterministic
        kernels were asked for, and cuDNN had room enough when it chose: only then this is another choice."""
        if not self._starved():
            return
        if not measured:
            self._rooms.note_short(func, args)
        self._refuse(func, inside=True, sure=measured and not self._rooms.chosen_short(func, args))

    def look_again(self, func: Any, *, trying: bool) -> None:
        """After it has run for a recipe. Raises ReplayFailed where it was starved, deterministic kernels were
        asked for, and there is nothing left to compare its bytes with, as there is in ``trying`` a recipe."""
        if not self._starved() or trying:
            return
        if _deterministic():
            raise ReplayFailed(
                f"{func} took {format_bytes(self._need_bytes)} at once in forward and found less, so that "
                "cuDNN took another algorithm, which may give other bits"
            )
        self._refuse(func, inside=True)

    def begin_again(self, func: Any) -> None:
        """It has raised, and is going to run once more: where that left no choice behind, what failed in it
        has decided nothing."""
        if self._rooms.chooses_once(func):
            self._settle()

    def _starved(self) -> bool:
        starved = self._settle() > 0
        self._rooms.starved += starved
        return starved

    def _settle(self) -> int:
        """How many allocations have failed since room was made, of which nobody has heard before."""
        hidden = max(0, self._hidden_ooms() - self._hidden_before)
        self._ladder.ooms += hidden
        return hidden

    def _refuse(self, func: Any, *, inside: bool = False, sure: bool = True) -> None:
        """There is less room than a convolution takes, before it runs or as was found ``inside``: an error if
        that is ``sure`` and matters, else said once for each place in the model."""
        where, need_bytes, budget_bytes = self._where(), self._need_bytes, self._ladder.budget_bytes
        if sure and _deterministic():
            raise self._ladder.refusals.convolution(func, where, need_bytes, budget_bytes, inside=inside)
        if (func, where) not in self._said:
            self._said.add((func, where))
            text = "no room for what %s in %s needs, %s at once: it may be slower, and give other bits"
            log.warning(text, func, where or "the model", format_bytes(need_bytes))


def _deterministic() -> bool:
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
