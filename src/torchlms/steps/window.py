"""Window: some steps of a training loop under torch's profiler, and a range around each for others."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from torchlms.outlet import check_folder

log = logging.getLogger("torchlms")


class ProfileWindow:
    """Call ``step()`` after each step: those from ``first`` to ``last``, both counted, are profiled, and
    ``path`` gets a trace that Perfetto and chrome://tracing read.

    Each step is marked in it, ``step 11``: ``torchlms report run.json --trace out.json --profile trace.json``
    puts the last one beside the plan. On CUDA every step of the loop is also an NVTX range of that name, for
    profilers that watch from outside. BadOption if ``path`` could not be written.

    >>> with ProfileWindow("trace.json", first=10, last=12) as window:  # doctest: +SKIP
    ...     for batch in loader:
    ...         train_on(batch)
    ...         window.step()
    """

    def __init__(self, path: str | Path, *, first: int = 10, last: int = 12) -> None:
        if not 0 <= first <= last:
            raise ValueError(
                f"first={first} and last={last}: steps are counted from 0, and first comes first"
            )
        self._path = Path(path)
        check_folder(self._path)
        self._first, self._last = first, last
        self._profiler: Any = None
        self._mark: Any = None  # of the step, in the profile
        self._ranges = torch.cuda.is_available()
        self._number = 0

    def __enter__(self) -> ProfileWindow:
        self._begin()
        return self

    def step(self) -> None:
        """A step has ended, and the next one begins."""
        self._end()
        if self._number == self._last:
            self._write()
        self._number += 1
        self._begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self._number < self._first:
            log.warning(
                "no step was profiled: the loop ended after %d steps, before step %d",
                self._number,
                self._first,
            )
        self._write()

    def _begin(self) -> None:
        if self._number == self._first:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._ranges else [])]
            self._profiler = profile(activities=activities, profile_memory=True)
            self._profiler.__enter__()
        if self._profiler is not None:
            self._mark = record_function(f"step {self._number}")
            self._mark.__enter__()
        if self._ranges:
            torch.cuda.nvtx.range_push(f"step {self._number}")

    def _end(self) -> None:
        if self._ranges:
            torch.cuda.nvtx.range_pop()
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.__exit__(None, None, None)

    def _write(self) -> None:
        """What was profiled so far, also of a loop that ended early."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.__exit__(None, None, None)
            profiler.export_chrome_trace(str(self._path))
