"""Releases: for values that are to leave, the op at which each is let go.

One walk over the tape, forward, on estimates of time: a value is let go when its copy out has ended; earlier,
with a stall, when memory demands it, and that is exact.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchlms.core.moves import Move
    from torchlms.core.schedule import Course

NEVER = -1

# Waiting a little longer than the estimate before a release that nobody needs yet costs nothing,
# and keeps a copy that runs late from stalling the step.
RELEASE_SLACK = 0.10


def releases_of(
    course: Course, moves: Sequence[Move], on_disk: frozenset[Move], due: Mapping[Move, int]
) -> tuple[list[int], list[float]]:
    """Release ops (NEVER where the copy was too late to be of use), and the clock before each op.

    ``moves`` come by their start; ``due``: see ``schedule``.
    """
    walk = _Forward(course, moves, on_disk, due)
    walk.run()
    return walk.releases, walk.moments_s


class _Forward:
    """Walks once over the tape with the copies out at their lone rate and no copies back."""

    def __init__(
        self, course: Course, moves: Sequence[Move], on_disk: frozenset[Move], due: Mapping[Move, int]
    ) -> None:
        count = len(course.op_s)
        self._op_s = course.op_s
        self._excess = course.excess
        self._moves = moves
        self._on_disk = on_disk
        self._pending: tuple[deque[int], deque[int]] = (deque(), deque())  # HOST, DISK; each by end
        self._ends_s = [0.0] * len(moves)
        self._free_s = [0.0] * len(moves)  # the end and the slack
        self._clock_s = self._link_free_s = self._disk_free_s = 0.0
        self._away_bytes = 0
        self._flight_room = course.flight_room
        self._leaving_bytes = 0
        self._returning = [0] * (count + 1)
        self._last_calls: dict[int, list[int]] = {}
        self._starts: dict[int, list[int]] = {}
        for index, move in enumerate(moves):
            self._starts.setdefault(move.start, []).append(index)
            if move.forced or move in due or course.waits_out:
                last_op = move.start if course.waits_out else due.get(move, move.stop - 1)
                self._last_calls.setdefault(last_op, []).append(index)
        self.releases = [NEVER] * len(moves)
        self.moments_s: list[float] = []

    def run(self) -> None:
        """Every op, and before it everything that happens at its moment, in the simulator's order."""
        op, count = 0, len(self._op_s)
        for begin in (*sorted({*self._starts, *self._last_calls}), count):
            while op < begin and (op := self._pass_by(op, begin)) < begin:
                op = self._run_op(op)
            if begin < count:
                op = self._run_op(begin)
        self.moments_s.append(self._clock_s)

    def _run_op(self, op: int) -> int:
        host, disk = self._pending
        if op in self._starts:
            self._issue(op)
        self._away_bytes -= self._returning[op]
        while host and self._ended(host[0], op):
            self._let_go(host.popleft(), op)
        while disk and self._ended(disk[0], op):
            self._let_go(disk.popleft(), op)
        for index in self._last_calls.get(op, ()):
            self._let_go(index, op, wait=True)
        while self._excess[op] + self._flight_room * self._leaving_bytes > self._away_bytes:
            if not any(self._pending):
                assert self._excess[op] <= self._away_bytes, "the moves do not cover the excess"
                break
            self._let_go(self._first_to_end().popleft(), op, wait=True)
        self.moments_s.append(self._clock_s)
        self._clock_s += self._op_s[op]
        return op + 1

    def _pass_by(self, op: int, stop: int) -> int:
        """Go by ops at which nothing happens; the next at which something may, or ``stop``, before which
        nothing begins."""
        host, disk = self._pending
        if not host and not disk:
            return self._pass_by_all(op, stop)
        free_s = math.inf
        if host:
            free_s, stop = self._free_s[host[0]], min(stop, self._moves[host[0]].stop)
        if disk:
            free_s, stop = min(free_s, self._free_s[disk[0]]), min(stop, self._moves[disk[0]].stop)
        return self._pass_by_until(op, stop, free_s)

    def _pass_by_all(self, first: int, stop: int) -> int:
        """Nothing is on its way."""
        self._away_bytes -= sum(self._returning[first:stop])
        clocks_s = list(accumulate(self._op_s[first:stop], initial=self._clock_s))
        self._clock_s = clocks_s.pop()
        self.moments_s += clocks_s
        return stop

    def _pass_by_until(self, op: int, stop: int, free_s: float) -> int:
        """While no copy is taken off its queue, and what is away is enough."""
        op_s, excess, returning, moments_s = self._op_s, self._excess, self._returning, self.moments_s
        clock_s, away_bytes = self._clock_s, self._away_bytes
        flying_bytes = self._flight_room * self._leaving_bytes
        while op < stop and clock_s < free_s and excess[op] + flying_bytes <= away_bytes - returning[op]:
            moments_s.append(clock_s)
            away_bytes -= returning[op]
            clock_s += op_s[op]
            op += 1
        self._clock_s, self._away_bytes = clock_s, away_bytes
        return op

    def _issue(self, op: int) -> None:
        for index in self._starts[op]:
            move = self._moves[index]
            on_disk = move in self._on_disk
            self._link_free_s = end_s = max(self._link_free_s, self._clock_s) + move.out_s
            if on_disk:
                self._disk_free_s = end_s = max(self._disk_free_s, end_s) + move.write_s
            self._ends_s[index] = end_s
            self._free_s[index] = end_s + RELEASE_SLACK * (move.out_s or move.write_s)
            self._pending[on_disk].append(index)
            self._leaving_bytes += move.size_bytes

    def _ended(self, index: int, op: int) -> bool:
        """Whether to take the copy off its queue: it has ended, or is wanted back before it could."""
        return self._free_s[index] <= self._clock_s or self._moves[index].stop <= op

    def _first_to_end(self) -> deque[int]:
        host, disk = self._pending
        if host and disk:
            return host if self._ends_s[host[0]] <= self._ends_s[disk[0]] else disk
        return host or disk

    def _let_go(self, index: int, op: int, *, wait: bool = False) -> None:
        move = self._moves[index]
        if self.releases[index] != NEVER:
            return
        self._leaving_bytes -= move.size_bytes
        if move.stop <= op:
            return
        if wait:
            self._clock_s = max(self._clock_s, self._ends_s[index])
        self.releases[index] = op
        self._away_bytes += move.size_bytes
        self._returning[move.stop] += move.size_bytes
