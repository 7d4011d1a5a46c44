"""Walk: the compute clock on its way through one step's moments, with the copy queues behind it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from torchlms.core.plan import Choice
from torchlms.core.queues import IN, OUT, Disk, Link

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.core.curve import Seconds
    from torchlms.core.machine import Machine
    from torchlms.core.moves import Slot

# Laps until what wraps around the end is taken as settled. Without wrapping one lap is exact.
SETTLING_LAPS = 4

NONE = -1  # no copy whose end is not yet known


@dataclass(frozen=True, slots=True)
class Transfer:
    """One copy out or back: issued, first byte moved, last byte arrived (disk and link together)."""

    value: int
    stretch: int
    choice: Choice
    direction: str  # "out" or "in"
    size_bytes: int
    issued_s: float
    start_s: float
    end_s: float


class _Copies:
    """Where one direction's copies stand, by place of the slot. Ends are 0 for what an earlier lap has long
    finished."""

    def __init__(self, slots: int) -> None:
        self.number = [NONE] * slots
        self.issued_s = [0.0] * slots
        self.start_s = [-1.0] * slots
        self.end_s = [0.0] * slots


# What happens at one moment, in order.
ISSUE, RELEASE, RELOAD, NEED = range(4)

# Op, which of the four, order among equals (reloads by need), value, place of the slot.
_Event = tuple[int, int, int, int, int]


class Walk:
    """One run over the laps. What each moment does, and in which order, is told in ``simulate``."""

    def __init__(
        self, machine: Machine, moments_s: Sequence[float], slots: Sequence[Slot], *, faster: float = 1.0
    ) -> None:
        """``faster``: how many times as fast all copies are as the slots say."""
        self._moments_s = moments_s
        self._share = 1 / faster
        self._slots = slots
        self._link = Link(machine.out_share, machine.in_share)
        self._has_link = bool(machine.link)
        self._writes, self._reads = Disk(), Disk()
        self._unwritten: deque[int] = deque()  # link copies issued whose disk write is not yet placed
        self._clock_s = 0.0
        self._numbers = count()
        self._out, self._in = _Copies(len(slots)), _Copies(len(slots))
        self._events = self._in_order()

    def settle(self, *, around: bool) -> tuple[Seconds, float]:
        """Walk until the lap repeats; what the clock waited at each moment of the last lap, its begin.
        ``around`` says that some slot goes around the end."""
        begin_s, stalls_s = 0.0, np.zeros(len(self._moments_s))
        for _ in range(SETTLING_LAPS if around else 1):
            begin_s, stalls_s = self._clock_s, self._lap()
        return stalls_s, begin_s

    def transfers(self, begin_s: float) -> tuple[Transfer, ...]:
        """The copies issued since ``begin_s``, in order of issue."""
        made = [
            transfer for place in range(len(self._slots)) for transfer in self._transfers_of(place, begin_s)
        ]
        return tuple(sorted(made, key=lambda transfer: transfer.issued_s))

    def _in_order(self) -> list[_Event]:
        """All events of a lap. Each of the four kinds is nearly sorted, which makes sorting all quick."""
        ops, places = len(self._moments_s) - 1, list(enumerate(self._slots))
        events = [(slot.move.start, ISSUE, 0, slot.move.value, place) for place, slot in places]
        events += [(slot.release_op, RELEASE, 0, slot.move.value, place) for place, slot in places]
        for place, slot in places:
            until = slot.move.stop - slot.reload_op
            events.append(
                (slot.reload_op, RELOAD, until if until >= 0 else until + ops, slot.move.value, place)
            )
        events += [(slot.move.stop, NEED, 0, slot.move.value, place) for place, slot in places]
        events.sort()
        return events

    def _lap(self) -> Seconds:
        """One step; what the clock waited before each op (and, last, after all of them)."""
        moments_s = self._moments_s
        stalls_s = [0.0] * len(moments_s)
        begin_s = self._clock_s
        stall_s = 0.0
        for op, event, _, _, place in self._events:
            clock_s = begin_s + moments_s[op] + stall_s
            if event == ISSUE:
                self._issue_out(place, clock_s)
            elif event == RELOAD:
                self._issue_in(place, clock_s)
            else:
                ready_s = self._out_end_s(place) if event == RELEASE else self._in_end_s(place)
                if ready_s > clock_s:
                    stalls_s[op] += ready_s - clock_s
                    stall_s += ready_s - clock_s
        self._clock_s = begin_s + moments_s[-1] + stall_s
        return np.array(stalls_s)

    def _issue_out(self, place: int, clock_s: float) -> None:
        out, slot = self._out, self._slots[place]
        out.issued_s[place] = clock_s
        if not self._has_link:
            out.start_s[place], out.end_s[place] = self._writes.pass_through(
                ready_s=clock_s, work_s=self._share * slot.move.write_s
            )
            return
        number = out.number[place] = next(self._numbers)
        self._link.queue(OUT, number, ready_s=clock_s, work_s=self._share * slot.move.out_s)
        if slot.on_disk:
            self._unwritten.append(place)

    def _out_end_s(self, place: int) -> float:
        """When the copy out has ended. The disk takes writes in the order in which they were issued."""
        out = self._out
        if out.number[place] == NONE:
            return out.end_s[place]
        if self._slots[place].on_disk:
            while out.number[place] != NONE:
                self._write(self._unwritten.popleft())
        else:
            self._leave_link(place)
        return out.end_s[place]

    def _leave_link(self, place: int) -> None:
        out = self._out
        out.end_s[place] = self._link.end_of(out.number[place])
        out.start_s[place] = self._link.start_s[out.number[place]]
        out.number[place] = NONE

    def _write(self, place: int) -> None:
        self._leave_link(place)
        _, self._out.end_s[place] = self._writes.pass_through(
            ready_s=self._out.end_s[place], work_s=self._share * self._slots[place].move.write_s
        )

    def _issue_in(self, place: int, clock_s: float) -> None:
        back, slot = self._in, self._slots[place]
        back.issued_s[place] = clock_s
        ready_s = max(clock_s, self._out_end_s(place))
        back.start_s[place] = -1.0
        if slot.on_disk:
            back.start_s[place], ready_s = self._reads.pass_through(
                ready_s=ready_s, work_s=self._share * slot.move.read_s
            )
        back.end_s[place] = ready_s
        if self._has_link:
            number = back.number[place] = next(self._numbers)
            self._link.queue(IN, number, ready_s=ready_s, work_s=self._share * slot.move.in_s)

    def _in_end_s(self, place: int) -> float:
        back = self._in
        number = back.number[place]
        if number != NONE:
            back.end_s[place] = self._link.end_of(number)
            if back.start_s[place] < 0:
                back.start_s[place] = self._link.start_s[number]
            back.number[place] = NONE
        return back.end_s[place]

    def _transfers_of(self, place: int, begin_s: float) -> list[Transfer]:
        """Its two copies in the last lap, times counted from the beginning of that lap."""
        ends_s = self._out_end_s(place), self._in_end_s(place)
        slot = self._slots[place]
        return [
            Transfer(
                slot.move.value,
                slot.move.stretch,
                Choice.DISK if slot.on_disk else Choice.HOST,
                direction,
                slot.move.size_bytes,
                copies.issued_s[place] - begin_s,
                max(copies.start_s[place], 0.0) - begin_s,
                end_s - begin_s,
            )
            for direction, copies, end_s in (("out", self._out, ends_s[0]), ("in", self._in, ends_s[1]))
        ]
