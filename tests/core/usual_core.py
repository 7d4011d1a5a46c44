"""Usual core: processor time of some work, in seconds of the core that the project's limits are stated for.

A limit in seconds holds for a core of some kind. Where tests run, cores may be half as fast, or share what
they have with a busy neighbour; a piece of work that is always the same, done just before and after, says by
how much. A core that is faster than the usual one does not make a limit stricter, nor looser.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_MEASURE_S = 0.15  # what `_measure` takes on the usual core


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    """How long ``work`` takes on the usual core, and what it returns."""
    before_s = _measure()
    began_s = time.process_time()
    made = work()
    took_s = time.process_time() - began_s
    slower = max(1.0, (before_s + _measure()) / (2 * _MEASURE_S))
    return took_s / slower, made


def _measure() -> float:
    """Processor seconds of a piece of work like a planner's: small objects, sorting, sums."""
    began_s = time.process_time()
    for _ in range(4):
        spans = [(index * 7919 % 65536, index) for index in range(40_000)]
        spans.sort()
        ends = {index: start for start, index in spans}
        total = 0
        for index, start in ends.items():
            total = max(total, total + start - index)
    return time.process_time() - began_s
