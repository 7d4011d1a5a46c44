"""Queues: when each copy starts and ends on a link whose two directions slow each other, and on a disk."""

from __future__ import annotations

import math
from heapq import heappop, heappush

OUT, IN = 0, 1

_Waiting = tuple[float, int, float]  # ready from, number, seconds of work


class Link:
    """Two first-come-first-served queues. While both are busy each runs at its share of its lone rate.

    Time is advanced only as far as somebody asks, so a copy may still be queued behind one whose end
    is not yet known. Promise expected from the caller: a copy is never made ready before an end that
    was already asked for. Copies are numbered by the caller, in order of issue.
    """

    def __init__(self, out_share: float, in_share: float) -> None:
        self._shares = (out_share, in_share)
        self._now_s = 0.0
        self._waiting: tuple[list[_Waiting], list[_Waiting]] = ([], [])
        self._current = [-1, -1]
        self._left_s = [0.0, 0.0]
        self.start_s: dict[int, float] = {}
        self.end_s: dict[int, float] = {}

    def queue(self, direction: int, copy: int, *, ready_s: float, work_s: float) -> None:
        """Copy number ``copy`` joins the queue at ``ready_s``; alone it takes ``work_s``."""
        heappush(self._waiting[direction], (ready_s, copy, work_s))

    def end_of(self, copy: int) -> float:
        """When ``copy`` ends."""
        ends_s, current, (out_waiting, in_waiting) = self.end_s, self._current, self._waiting
        while copy not in ends_s:
            out_busy = out_waiting or current[OUT] >= 0
            in_busy = in_waiting or current[IN] >= 0
            if out_busy and not in_busy:
                self._finish_next(OUT)
            elif in_busy and not out_busy:
                self._finish_next(IN)
            else:
                self._advance()
        return ends_s[copy]

    def _finish_next(self, direction: int) -> None:
        """The same as ``_advance`` until one copy has ended, where the other direction has none at all."""
        copy, left_s, now_s = self._current[direction], self._left_s[direction], self._now_s
        if copy < 0:
            ready_s, copy, left_s = heappop(self._waiting[direction])
            if ready_s > now_s:
                now_s = max(now_s + (ready_s - now_s), ready_s)  # as the sum there is rounded
            self.start_s[copy] = now_s
        self._now_s = self.end_s[copy] = now_s + left_s
        self._current[direction] = -1

    def _advance(self) -> None:
        """Go on to the next moment at which a copy starts or ends."""
        current, left_s = self._current, self._left_s
        for direction in (OUT, IN):
            waiting = self._waiting[direction]
            if current[direction] < 0 and waiting and waiting[0][0] <= self._now_s:
                _, current[direction], left_s[direction] = heappop(waiting)
                self.start_s[current[direction]] = self._now_s
        both = current[OUT] >= 0 and current[IN] >= 0
        rates = self._shares if both else (1.0, 1.0)
        out_next_s, in_next_s = self._next_s(OUT, rates[OUT]), self._next_s(IN, rates[IN])
        step_s = min(out_next_s, in_next_s)
        assert step_s < math.inf, "asked for the end of a copy that was never queued"
        self._now_s += step_s
        for direction, next_s in ((OUT, out_next_s), (IN, in_next_s)):
            if current[direction] < 0:
                if next_s <= step_s:  # a copy is ready: be exact, whatever the sum rounded to
                    self._now_s = max(self._now_s, self._waiting[direction][0][0])
            elif next_s <= step_s:
                self.end_s[current[direction]] = self._now_s
                current[direction] = -1
            else:
                left_s[direction] = max(0.0, left_s[direction] - step_s * rates[direction])

    def _next_s(self, direction: int, rate: float) -> float:
        """Seconds until this direction's copy ends or, when it is idle, until its next one is ready."""
        if self._current[direction] >= 0:
            return self._left_s[direction] / rate
        waiting = self._waiting[direction]
        return waiting[0][0] - self._now_s if waiting else math.inf


class Disk:
    """One direction of a disk: one queue, first come first served, at a constant rate.

    Reads and writes are two of these: what they do to each other is not modelled.
    """

    def __init__(self) -> None:
        self._free_s = 0.0

    def pass_through(self, *, ready_s: float, work_s: float) -> tuple[float, float]:
        """Start and end of a transfer that is ready at ``ready_s``, after all those before it."""
        start_s = max(ready_s, self._free_s)
        self._free_s = start_s + work_s
        return start_s, self._free_s
