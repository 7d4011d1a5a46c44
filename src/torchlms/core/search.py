"""Search: which moves. Tries covers, keeps the one whose simulated step is best, and works on it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torchlms.core.cover import cover, left_over
from torchlms.core.moves import Move, Slot
from torchlms.core.plan import Choice, Decision
from torchlms.core.schedule import NOTHING_DUE, Course, Lead, schedule
from torchlms.core.tiers import Places, Room, choose_disk, place_all
from torchlms.errors import HostBudgetTooSmall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torchlms.core.curve import Bytes
    from torchlms.core.planned import Speeds
    from torchlms.core.simulate import Simulator, Timeline

# Work one search may do, in units of about a microsecond: what one op or one move costs to schedule
# and simulate, and what one candidate costs to be looked at for a cover.
EFFORT = 400_000
WHOLE = 1.0  # times that; with less a set of moves is only looked for
OP_WORK, MOVE_WORK, LOOK_WORK = 1, 30, 6
IMPROVE_SHARE = 0.7  # of the effort; the rest is for when, not which

# A copy that hides still heats the link and may not hide tomorrow: each second of it counts as this.
COPY_WEIGHT = 0.002

# Stalls below this share of the compute time are as good as none.
ENOUGH = 0.001

# How long before its queue gets to it a copy back is issued.
QUEUED_S = 5e-3

# How many ops earlier than scheduled a value is tried to be let go.
HASTEN_OPS = 8

LEADS = (Lead(), Lead(seconds=0.0, copies=0.0), Lead(seconds=5e-3, copies=1.0), Lead(seconds=float("inf")))

# Room to spare for copies back, as shares of what would be moved if everything were.
SPARE_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)


@dataclass(frozen=True, slots=True)
class Found:
    """The best schedule of a search, where its values go, the step that comes of it on the machine, and what
    that waits with slower copies."""

    slots: tuple[Slot, ...]
    places: Places
    timeline: Timeline
    slower_stall_s: float


# What a trial follows from: the moves and which of them are on disk, the lead, and what is due.
_Key = tuple[frozenset[Move], frozenset[Move], Lead, frozenset[tuple[Move, int]]]


@dataclass(frozen=True, slots=True)
class _Trial:
    """One set of moves, scheduled and simulated."""

    moves: tuple[Move, ...]
    slots: tuple[Slot, ...]
    lead: Lead
    due: Mapping[Move, int]
    stall_s: float
    score_s: float
    idle: bool  # nothing worth mentioning is left to gain


def search(
    simulator: Simulator,
    course: Course,
    candidates: Sequence[Move],
    room: Room,
    *,
    effort: float,
    speeds: Speeds,
) -> Found:
    """The best set of moves found within ``effort`` times the usual, for copies as the candidates have them.
    The candidates together must cover the excess."""
    return _Search(simulator, course, candidates, room, effort, speeds).run()


class _Search:
    def __init__(
        self,
        simulator: Simulator,
        course: Course,
        candidates: Sequence[Move],
        room: Room,
        effort: float,
        speeds: Speeds,
    ) -> None:
        self._whole = effort >= WHOLE
        self._effort = effort * EFFORT
        self._speeds = speeds
        self._simulator = simulator
        self._course = course
        self._candidates = candidates
        self._forced = [move for move in candidates if move.forced]
        self._free = [move for move in candidates if not move.forced]
        self._room = room
        self._excess = course.baseline - course.limit_bytes
        self._floor = left_over(self._excess, candidates)
        self._work = 0
        self._tried: set[_Key] = set()
        self._best: _Trial | None = None
        self._refusal: HostBudgetTooSmall | None = None

    def run(self) -> Found:
        ranked = self._seed()
        if self._best is not None and not self._best.idle:
            self._spare(ranked)
            self._improve(ranked)
            self._retime()
            self._hasten()
        return self._finish()

    def _seed(self) -> list[Move]:
        """Try each order once; the order that did best."""
        best_order = self._orders()[0]
        for order in self._orders():
            moves = self._cover(order)
            assert moves is not None, "the candidates do not cover the excess"
            if self._try(moves):
                best_order = order
            if self._done():
                break
        return best_order

    def _orders(self) -> list[list[Move]]:
        """Longest idle; most seconds over the budget relieved per second of copying; largest."""
        over_s = np.concatenate(([0.0], np.cumsum(np.array(self._course.op_s) * (self._excess > 0))))

        def relief(move: Move) -> float:
            relieved_s = float(over_s[move.stop] - over_s[move.start])
            return relieved_s * move.size_bytes / max(move.copies_s, 1e-12)

        keys: tuple[Callable[[Move], float], ...] = (
            lambda move: move.idle_s,
            relief,
            lambda move: float(move.size_bytes),
        )
        return [sorted(self._free, key=key, reverse=True) for key in keys]

    def _spare(self, ranked: Sequence[Move]) -> None:
        """Try the same order with more leaving than must, so that copies back find room earlier."""
        floor = self._floor
        movable_bytes = int((self._excess - floor).max(initial=0))
        for share in SPARE_SHARES:
            if self._done():
                return
            wanted: Bytes = self._excess + int(share * movable_bytes)
            wanted = wanted - np.maximum(floor + int(share * movable_bytes), 0)  # no more than can leave
            moves = self._cover(ranked, wanted)
            if moves is not None:
                self._try(moves)

    def _improve(self, ranked: Sequence[Move]) -> None:
        """First better neighbour, until a whole round brings nothing or the effort is spent."""
        improved = True
        while improved:
            improved = False
            for move in filter(self._dispensable, ranked):
                if self._done(IMPROVE_SHARE):
                    return
                for neighbour in self._neighbours(move, ranked):
                    improved |= self._try(neighbour)

    def _dispensable(self, move: Move) -> bool:
        """Whether all the others together could do without it."""
        return bool(np.max(self._floor[move.start : move.stop]) + move.size_bytes <= 0)

    def _neighbours(self, move: Move, ranked: Sequence[Move]) -> Iterator[Sequence[Move]]:
        """The best set with ``move`` turned round: exchanged if it is in, added or exchanged if it is not."""
        assert self._best is not None
        current = [other for other in self._best.moves if not other.forced]
        if move in current:
            inside = set(current)
            rest = [other for other in current if other is not move]
            exchanged = self._cover(rest + [other for other in ranked if other not in inside])
        else:
            yield self._forced + current + [move]
            exchanged = self._cover([move] + current)
        if exchanged is not None:
            yield exchanged

    def _retime(self) -> None:
        """The best set with other leads."""
        assert self._best is not None
        moves = self._best.moves
        for lead in LEADS[1:]:
            if self._done():
                return
            self._try(moves, lead)

    def _hasten(self) -> None:
        """The best set with single values let go earlier, which costs a stall and gives room."""
        assert self._best is not None
        improved = True
        while improved:
            improved = False
            for slot in self._best.slots:
                for op in range(slot.release_op - 1, slot.move.start - 1, -1)[:HASTEN_OPS]:
                    if self._done():
                        return
                    best = self._best
                    improved |= self._try(best.moves, best.lead, {**best.due, slot.move: op})

    def _cover(self, ranked: Sequence[Move], excess: Bytes | None = None) -> list[Move] | None:
        self._work += LOOK_WORK * len(ranked)
        return cover(self._excess if excess is None else excess, ranked, always=self._forced)

    def _done(self, share: float = 1.0) -> bool:
        return self._work > share * self._effort or (self._best is not None and self._best.idle)

    def _try(
        self, moves: Sequence[Move], lead: Lead = LEADS[0], due: Mapping[Move, int] = NOTHING_DUE
    ) -> bool:
        """Schedule and simulate ``moves``; keep them if they are the best so far."""
        self._work += OP_WORK * len(self._course.op_s) + MOVE_WORK * len(moves)
        try:
            on_disk = choose_disk(moves, self._room)
        except HostBudgetTooSmall as refusal:
            if self._refusal is None or refusal.missing_bytes < self._refusal.missing_bytes:
                self._refusal = refusal.with_traceback(None)
            return False
        if self._was_tried(moves, on_disk, lead, due):
            return False  # it was no better than what was best then, and that has only become better
        slots = tuple(schedule(self._course, moves, on_disk, lead, due))
        trial = self._trial(moves, slots, lead, due)
        if self._best is not None and trial.score_s >= self._best.score_s * (1 - 1e-9):
            return False
        self._best = trial
        return True

    def _was_tried(
        self, moves: Sequence[Move], on_disk: frozenset[Move], lead: Lead, due: Mapping[Move, int]
    ) -> bool:
        key = (frozenset(moves), on_disk, lead, frozenset(due.items()))
        known = key in self._tried
        self._tried.add(key)
        return known

    def _trial(
        self, moves: Sequence[Move], slots: tuple[Slot, ...], lead: Lead, due: Mapping[Move, int]
    ) -> _Trial:
        stall_s = self._simulator.stall_of(slots)
        compute_s = float(self._simulator.moments_s[-1])
        copies_s = sum(slot.move.copies_s for slot in slots)
        return _Trial(
            tuple(moves),
            slots,
            lead,
            due,
            stall_s,
            score_s=compute_s + stall_s + COPY_WEIGHT * copies_s,
            idle=stall_s <= ENOUGH * compute_s,
        )

    def _finish(self) -> Found:
        """Real places for the best. Packing may send a few more values to disk than the search thought."""
        if self._best is None:
            assert self._refusal is not None
            raise self._refusal
        moves = [slot.move for slot in self._best.slots]
        places = place_all(moves, self._room)
        slots = self._best.slots
        if places.on_disk != {slot.move for slot in slots if slot.on_disk}:
            slots = tuple(schedule(self._course, moves, places.on_disk, self._best.lead, self._best.due))
        timeline = self._simulator.play(slots, faster=self._speeds.machine)
        if self._whole:
            slots, timeline = self._unhurried(slots, timeline)
        known = slots is self._best.slots and self._speeds.slower == 1.0
        slower_stall_s = (
            self._best.stall_s if known else self._simulator.stall_of(slots, faster=self._speeds.slower)
        )
        return Found(slots, places, timeline, slower_stall_s)

    def _unhurried(self, slots: tuple[Slot, ...], timeline: Timeline) -> tuple[tuple[Slot, ...], Timeline]:
        """The same with no copy back issued long before the machine's queue gets to it: the step takes as
        long, and the memory is not held meanwhile."""
        begins_s = {
            (transfer.value, transfer.stretch): transfer.start_s
            for transfer in timeline.transfers
            if transfer.direction == "in"
        }
        starts_s = timeline.start_s.tolist()
        later = []
        for slot in slots:
            move = slot.move
            op = bisect_right(starts_s, begins_s[move.value, move.stretch] - QUEUED_S) - 1
            reload_op = max(slot.reload_op, min(op, move.stop - self._course.ahead_ops))
            later.append(Slot(move, slot.on_disk, slot.release_op, reload_op))
        played = self._simulator.play(later, faster=self._speeds.machine)
        if played.stall_s <= timeline.stall_s + ENOUGH * timeline.compute_s:
            return tuple(later), played
        return slots, timeline


def decision_of(slot: Slot, *, offset_bytes: int = 0, reason: str = "") -> Decision:
    """The slot as a record."""
    return Decision(
        value=slot.move.value,
        stretch=slot.move.stretch,
        choice=Choice.DISK if slot.on_disk else Choice.HOST,
        release_op=slot.release_op,
        reload_op=slot.reload_op,
        offset_bytes=offset_bytes,
        reason=reason,
    )
