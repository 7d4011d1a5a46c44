"""Walk: the compute clock on its way through one step's moments, with the copy queues behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torchlms.core.curve import wraps
from torchlms.core.plan import Choice, Decision
from torchlms.core.queues import IN, OUT, Disk, Link
from torchlms.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.core.curve import Seconds
    from torchlms.core.simulate import Simulator

# Laps until what wraps around the end is taken as settled. Without wrapping one lap is exact.
SETTLING_LAPS = 4


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


@dataclass(slots=True)
class _Copies:
    """Where one decision's copies stand. Ends are 0 for what an earlier lap has long finished."""

    decision: Decision
    start: int
    stop: int
    size_bytes: int
    out_copy: int = -1
    in_copy: int = -1
    out_issued_s: float = 0.0
    in_issued_s: float = 0.0
    out_start_s: float = -1.0
    in_start_s: float = -1.0
    out_end_s: float = 0.0
    in_end_s: float = 0.0


# What happens at one moment, in order.
ISSUE, RELEASE, RELOAD, NEED = range(4)

# Op, which of the four, order among equals (reloads by need), value, index of the decision.
_Event = tuple[int, int, int, int, int]


class Walk:
    """One run over the laps. What each moment does, and in which order, is told in ``simulate``."""

    def __init__(self, simulator: Simulator, moves: Sequence[Decision]) -> None:
        self._simulator = simulator
        self._link = Link(simulator.machine.out_share, simulator.machine.in_share)
        self._has_link = bool(simulator.machine.link)
        self._writes, self._reads = Disk(), Disk()
        self._unwritten: list[_Copies] = []  # link copies issued whose disk write is not yet placed
        self._clock_s = 0.0
        self._count = 0
        self._wraps = False
        self._copies = [self._copies_of(move) for move in moves]
        self._events = sorted(event for index in range(len(moves)) for event in self._events_of(index))

    def settle(self) -> tuple[Seconds, float]:
        """Walk until the lap repeats; what the clock waited at each moment of the last lap, its begin."""
        begin_s, stalls_s = 0.0, np.zeros(len(self._simulator.moments_s))
        for _ in range(SETTLING_LAPS if self._wraps else 1):
            begin_s, stalls_s = self._clock_s, self._lap()
        return stalls_s, begin_s

    def transfers(self, begin_s: float) -> tuple[Transfer, ...]:
        """The copies issued since ``begin_s``, in order of issue."""
        made = [transfer for copies in self._copies for transfer in self._transfers_of(copies, begin_s)]
        return tuple(sorted(made, key=lambda transfer: transfer.issued_s))

    def _copies_of(self, move: Decision) -> _Copies:
        value = self._simulator.tape.values[move.value]
        stretch = value.idle[move.stretch]
        if move.choice not in (Choice.HOST, Choice.DISK):
            raise NotSupported(f"the simulator cannot yet judge {move.choice.value} (value {move.value})")
        if move.choice is Choice.HOST and not self._has_link:
            raise NotSupported("HOST means nothing on a machine whose device is the CPU; use DISK")
        count = len(self._simulator.tape.ops)
        around = wraps(stretch)
        self._wraps = self._wraps or around
        start, stop = (
            (stretch.start % count, stretch.stop % count) if around else (stretch.start, stretch.stop)
        )
        return _Copies(move, start, stop, value.size_bytes)

    def _events_of(self, index: int) -> tuple[_Event, ...]:
        copies = self._copies[index]
        decision = copies.decision
        until = copies.stop - decision.reload_op
        if until < 0:
            until += len(self._simulator.tape.ops)
        return (
            (copies.start, ISSUE, 0, decision.value, index),
            (decision.release_op, RELEASE, 0, decision.value, index),
            (decision.reload_op, RELOAD, until, decision.value, index),
            (copies.stop, NEED, 0, decision.value, index),
        )

    def _lap(self) -> Seconds:
        """One step; what the clock waited before each op (and, last, after all of them)."""
        moments_s: list[float] = self._simulator.moments_s.tolist()
        stalls_s = [0.0] * len(moments_s)
        begin_s = self._clock_s
        stall_s = 0.0
        for op, event, _, _, index in self._events:
            copies = self._copies[index]
            clock_s = self._clock_s = begin_s + moments_s[op] + stall_s
            if event == ISSUE:
                self._issue_out(copies)
            elif event == RELOAD:
                self._issue_in(copies)
            else:
                ready_s = self._out_end_s(copies) if event == RELEASE else self._in_end_s(copies)
                if ready_s > clock_s:
                    stalls_s[op] += ready_s - clock_s
                    stall_s += ready_s - clock_s
        self._clock_s = begin_s + moments_s[-1] + stall_s
        return np.array(stalls_s)

    def _issue_out(self, copies: _Copies) -> None:
        copies.out_issued_s = self._clock_s
        copies.out_copy = -1
        if not self._has_link:
            write_s = self._simulator.machine.disk_write_s(copies.size_bytes)
            copies.out_start_s, copies.out_end_s = self._writes.pass_through(
                ready_s=self._clock_s, work_s=write_s
            )
            return
        copies.out_copy = self._number()
        out_s, _ = self._simulator.copy_s(copies.size_bytes)
        self._link.queue(OUT, copies.out_copy, ready_s=self._clock_s, work_s=out_s)
        if copies.decision.choice is Choice.DISK:
            self._unwritten.append(copies)

    def _out_end_s(self, copies: _Copies) -> float:
        """When the copy out has ended. The disk takes writes in the order in which they were issued."""
        if copies.out_copy < 0:
            return copies.out_end_s
        if copies.decision.choice is Choice.DISK:
            while copies.out_copy >= 0:
                self._write(self._unwritten.pop(0))
        else:
            copies.out_end_s = self._link.end_of(copies.out_copy)
            copies.out_start_s = self._link.start_s[copies.out_copy]
            copies.out_copy = -1
        return copies.out_end_s

    def _write(self, copies: _Copies) -> None:
        ready_s = self._link.end_of(copies.out_copy)
        work_s = self._simulator.machine.disk_write_s(copies.size_bytes)
        _, copies.out_end_s = self._writes.pass_through(ready_s=ready_s, work_s=work_s)
        copies.out_start_s = self._link.start_s[copies.out_copy]
        copies.out_copy = -1

    def _issue_in(self, copies: _Copies) -> None:
        copies.in_issued_s = self._clock_s
        ready_s = max(self._clock_s, self._out_end_s(copies))
        copies.in_start_s = -1.0
        copies.in_copy = -1
        if copies.decision.choice is Choice.DISK:
            read_s = self._simulator.machine.disk_read_s(copies.size_bytes)
            copies.in_start_s, ready_s = self._reads.pass_through(ready_s=ready_s, work_s=read_s)
        copies.in_end_s = ready_s
        if self._has_link:
            _, in_s = self._simulator.copy_s(copies.size_bytes)
            copies.in_copy = self._number()
            self._link.queue(IN, copies.in_copy, ready_s=ready_s, work_s=in_s)

    def _in_end_s(self, copies: _Copies) -> float:
        if copies.in_copy >= 0:
            copies.in_end_s = self._link.end_of(copies.in_copy)
            if copies.in_start_s < 0:
                copies.in_start_s = self._link.start_s[copies.in_copy]
            copies.in_copy = -1
        return copies.in_end_s

    def _number(self) -> int:
        self._count += 1
        return self._count

    def _transfers_of(self, copies: _Copies, begin_s: float) -> list[Transfer]:
        """Its two copies in the last lap, times counted from the beginning of that lap."""
        out_end_s, in_end_s = self._out_end_s(copies), self._in_end_s(copies)
        move = copies.decision
        return [
            Transfer(
                move.value,
                move.stretch,
                move.choice,
                direction,
                copies.size_bytes,
                issued_s - begin_s,
                max(start_s, 0.0) - begin_s,
                end_s - begin_s,
            )
            for direction, issued_s, start_s, end_s in (
                ("out", copies.out_issued_s, copies.out_start_s, out_end_s),
                ("in", copies.in_issued_s, copies.in_start_s, in_end_s),
            )
        ]
