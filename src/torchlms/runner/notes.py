"""Notes: what is written down of a script's steps: a row each, a profile of some, a line on what is now.

A step ends where an optimizer's step does. Of several optimizers the one that stepped first counts, so that
a loop with two of them has one row a lap.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch.utils.hooks import RemovableHandle

from torchlms.live import live_line
from torchlms.memory.limits import format_bytes
from torchlms.steps import ProfileWindow, StepLog

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from torchlms.runner.finder import Finder
    from torchlms.runner.request import Request


class StepNotes:
    """Open from the moment the script has imported torch until ``close``."""

    def __init__(self, request: Request, finder: Finder) -> None:
        self._counts: weakref.ref[torch.optim.Optimizer] | None = None
        self._open = ExitStack()
        self._window: ProfileWindow | None = None
        self._log: StepLog | None = None
        self._told: OrderedDict[int, Callable[[], None]] = (
            OrderedDict()
        )  # who else is told that a step has ended
        if request.csv_path is not None:
            log = StepLog(finder, request.csv_path, skip=request.skip, batch_size=request.batch_size)
            self._log = self._open.enter_context(log)
        if request.profile is not None:
            first, last = request.profiled
            self._window = self._open.enter_context(ProfileWindow(request.profile, first=first, last=last))
        if request.live:
            line = live_line(finder.stats, items=request.batch_size, listen=self._listen)
            self._open.enter_context(line)
        self._open.callback(finder.optimizers.register_step_post_hook(self._step_ended).remove)

    def averages(self) -> dict[str, float]:
        """Of the log, empty if there is none."""
        return self._log.averages() if self._log is not None else {}

    def close(self) -> None:
        self._open.close()

    def _listen(self, told: Callable[[], None]) -> RemovableHandle:
        handle = RemovableHandle(self._told)
        self._told[handle.id] = told
        return handle

    def _step_ended(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if self._counts is None or self._counts() is None:
            self._counts = weakref.ref(optimizer)
        if self._counts() is not optimizer:
            return
        if self._log is not None:
            self._log.step()
        if self._window is not None:
            self._window.step()
        for told in self._told.values():
            told()


def averages_text(averages: dict[str, float]) -> str:
    """What a step was like, in a line."""
    rate = f", {averages['items_per_s']:.1f} items/s" if "items_per_s" in averages else ""
    return (
        f"{averages['steps']:.0f} steps of the optimizer, {averages['seconds'] * 1e3:.1f} ms on average "
        f"(median {averages['median_seconds'] * 1e3:.1f} ms){rate}, {averages['reclaims']:.1f} reclaims and "
        f"{format_bytes(int(averages['reclaimed_bytes']))} reclaimed in each"
    )
