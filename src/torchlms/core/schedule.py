"""Schedule: for values that are to leave, the ops at which each is let go and called back.

Two passes over the tape, both on estimates; the simulator has the last word on time, while memory
is exact: a schedule never puts an op above the limit if letting all of its moves go could avoid it.

    releases   forward: when the copy out has ended; earlier, with a stall, when memory demands it
    reloads    latest start that meets every deadline (backward), less a lead; later when there is
               no room (forward, by need)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from torchlms.core.curve import occupancy
from torchlms.core.moves import Move, Slot
from torchlms.core.releases import NEVER, releases_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchlms.core.curve import Bytes

NOTHING_DUE: Mapping[Move, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Lead:
    """How much earlier than just in time a reload is issued: the larger of the two."""

    seconds: float = 1e-3
    copies: float = 0.25

    def before_s(self, copy_s: float) -> float:
        return max(self.seconds, self.copies * copy_s)


@dataclass(frozen=True)
class Course:
    """What every schedule of one tape shares: seconds of each op, bytes with nothing moved, the limit.

    ``flight_room`` is what a value takes beyond its size, as a share of it, while a copy of it is in
    flight: it cannot be moved out of the way then, so the memory around it is harder to use. Copies back
    are issued at least ``ahead_ops`` before the need where memory permits, and at most ``within_ops``;
    with ``waits_out`` each copy out is waited for where it begins.
    """

    op_s: tuple[float, ...]
    baseline: Bytes
    limit_bytes: int
    flight_room: float = 0.0
    ahead_ops: int = 0
    within_ops: int | None = None
    waits_out: bool = False

    @cached_property
    def excess(self) -> list[int]:
        """Bytes above the limit at each op with nothing moved."""
        excess: list[int] = (self.baseline - self.limit_bytes).tolist()
        return excess


def schedule(
    course: Course,
    moves: Sequence[Move],
    on_disk: frozenset[Move],
    lead: Lead,
    due: Mapping[Move, int] = NOTHING_DUE,
) -> list[Slot]:
    """Places for ``moves``. One that need not be let go in time is left out, unless a rule demands it.

    ``due`` names moves to be let go before some op at the latest, whatever that makes the step wait:
    the room may be worth more to a copy back.
    """
    chosen = sorted(moves, key=lambda move: (move.start, move.value))
    while True:
        releases, moments_s = releases_of(course, chosen, on_disk, due)
        if NEVER not in releases:
            break
        chosen = [move for move, op in zip(chosen, releases, strict=True) if op != NEVER]
    reloads = _reload(course, chosen, releases, moments_s, on_disk, lead)
    return [
        Slot(move, move in on_disk, release_op, reload_op)
        for move, release_op, reload_op in zip(chosen, releases, reloads, strict=True)
    ]


def _reload(
    course: Course,
    moves: Sequence[Move],
    releases: Sequence[int],
    moments_s: Sequence[float],
    on_disk: frozenset[Move],
    lead: Lead,
) -> list[int]:
    """Reload ops: in time for every deadline where memory has room, by need where it has not."""
    bytes_at = course.baseline - occupancy(
        len(course.op_s), releases, [move.stop for move in moves], [move.size_bytes for move in moves]
    )
    by_need = sorted(range(len(moves)), key=[(move.stop, move.value) for move in moves].__getitem__)
    wished = _just_in_time(moves, by_need, moments_s, on_disk, lead)
    reloads = [0] * len(moves)
    last = [0, 0]  # by tier: a reload issued before one that is needed earlier would delay it
    limit_bytes, within_ops, taken = course.limit_bytes, course.within_ops, 1 + course.flight_room
    for index in by_need:
        move = moves[index]
        tier, stop = move in on_disk, move.stop
        wished_op = min(wished[index], stop - course.ahead_ops)
        reload_op = min(max(wished_op, releases[index] + 1, last[tier]), stop)
        coming_bytes = int(move.size_bytes * taken)
        if reload_op < stop:
            full = (bytes_at[reload_op:stop] > limit_bytes - coming_bytes).nonzero()[0]
            reload_op += int(full[-1]) + 1 if len(full) else 0
        if within_ops is not None:
            reload_op = max(reload_op, stop - within_ops)
        if reload_op < stop:
            bytes_at[reload_op:stop] += coming_bytes
        reloads[index] = last[tier] = reload_op
    return reloads


def _just_in_time(
    moves: Sequence[Move],
    by_need: Sequence[int],
    moments_s: Sequence[float],
    on_disk: frozenset[Move],
    lead: Lead,
) -> list[int]:
    """The last op at which each reload could be issued if memory were no matter, less the lead.

    Backward from the last need: each copy back ends when it is needed, or when the one after it on
    the same queue has to start.
    """
    ops = [0] * len(moves)
    link_s = disk_s = math.inf
    for index in reversed(by_need):
        move = moves[index]
        copy_s = move.in_s
        link_s = begin_s = min(moments_s[move.stop], link_s) - move.in_s
        if move in on_disk:
            copy_s += move.read_s
            disk_s = begin_s = min(disk_s, link_s) - move.read_s
        ops[index] = bisect_right(moments_s, begin_s - lead.before_s(copy_s)) - 1
    return ops
