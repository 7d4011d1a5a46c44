"""Simulate: a tape, a machine and decisions in; the timeline of one step out.

One compute queue, one queue per link direction, one queue each for disk reads and writes. At each
moment i (before op i), in this order:

    issue     copies out whose stretch starts at i, by value id, at the compute clock
    release   decisions with release_op == i: the clock waits for the copy out, the bytes are freed
    reload    decisions with reload_op == i, by need (stretch.stop, then value id): bytes are
              allocated, the copy back is queued, not before the clock nor before its copy out ended
    need      stretches that stop at i: the clock waits for the copy back
    run       op i

DISK on a machine with a link: out is a link copy, then a disk write, and the copy out has ended
when the write has; back is a disk read, then a link copy that joins the link's queue when the read
has ended. Without a link (the device is the CPU) only the disk queues are used.

Not modelled: disk reads and writes slowing each other, a shortage of staging memory between disk
and link, the host's own time to issue anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from torchlms.core.curve import baseline_curve, floor_curve, memory_curve, smallest_budget, wraps
from torchlms.core.plan import Choice, Decision, Prediction
from torchlms.core.queues import IN, OUT, Disk, Link
from torchlms.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchlms.core.curve import Bytes
    from torchlms.core.machine import Machine
    from torchlms.core.tape import Tape

__all__ = [
    "Simulator",
    "Timeline",
    "Transfer",
    "baseline_curve",
    "floor_curve",
    "memory_curve",
    "prediction",
    "simulate",
    "smallest_budget",
]

# Laps until what wraps around the end is taken as settled. Without wrapping one lap is exact.
SETTLING_LAPS = 4

Seconds = npt.NDArray[np.float64]


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


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """One step in its steady state. Times count from the beginning of the step.

    ``memory_bytes``, ``start_s`` and ``end_s`` have one entry per op. ``compute_s`` is the sum of op
    times, ``stall_s`` what the compute queue waits, ``step_s`` their sum.
    """

    memory_bytes: Bytes
    peak_device_bytes: int
    peak_op: int
    step_s: float
    compute_s: float
    stall_s: float
    start_s: Seconds
    end_s: Seconds
    transfers: tuple[Transfer, ...]
    bytes_out: int
    bytes_in: int
    disk_bytes: int


def simulate(tape: Tape, machine: Machine, decisions: Iterable[Decision]) -> Timeline:
    """What one step does under ``decisions``. Says nothing about whether they are legal: ``validate``."""
    return Simulator(tape, machine).run(decisions)


def prediction(timeline: Timeline, *, arena_bytes: int = 0, spill_bytes: int = 0) -> Prediction:
    """The figures of a timeline, to be kept in a plan."""
    return Prediction(
        peak_device_bytes=timeline.peak_device_bytes,
        peak_op=timeline.peak_op,
        step_s=timeline.step_s,
        compute_s=timeline.compute_s,
        stall_s=timeline.stall_s,
        bytes_out=timeline.bytes_out,
        bytes_in=timeline.bytes_in,
        disk_bytes=timeline.disk_bytes,
        arena_bytes=arena_bytes,
        spill_bytes=spill_bytes,
    )


class Simulator:
    """One tape on one machine, ready to run many sets of decisions."""

    def __init__(self, tape: Tape, machine: Machine) -> None:
        self.tape = tape
        self.machine = machine
        self.baseline = baseline_curve(tape)
        self.moments_s: Seconds = np.zeros(len(tape.ops) + 1)
        np.cumsum([op.time_s for op in tape.ops], out=self.moments_s[1:])
        self._copy_s: dict[int, tuple[float, float]] = {}

    def copy_s(self, size_bytes: int) -> tuple[float, float]:
        """Lone link seconds out and in; remembered, since sizes repeat."""
        if size_bytes not in self._copy_s:
            self._copy_s[size_bytes] = (self.machine.out_s(size_bytes), self.machine.in_s(size_bytes))
        return self._copy_s[size_bytes]

    def run(self, decisions: Iterable[Decision]) -> Timeline:
        """The timeline of one step."""
        moves = [decision for decision in decisions if decision.choice is not Choice.KEEP]
        curve = memory_curve(self.tape, moves, baseline=self.baseline)
        peak_op = int(curve.argmax()) if len(curve) else -1
        sizes = [self.tape.values[move.value].size_bytes for move in moves]
        on_disk = sum(size for size, move in zip(sizes, moves, strict=True) if move.choice is Choice.DISK)
        walk = _Walk(self, moves)
        stalls_s, begin_s = walk.settle()
        stall_s, compute_s = float(stalls_s.sum()), float(self.moments_s[-1])
        start_s = (self.moments_s + np.cumsum(stalls_s))[:-1]
        return Timeline(
            memory_bytes=curve,
            peak_device_bytes=int(curve[peak_op]) if len(curve) else self.tape.resident_bytes,
            peak_op=peak_op,
            step_s=compute_s + stall_s,
            compute_s=compute_s,
            stall_s=stall_s,
            start_s=start_s,
            end_s=start_s + np.diff(self.moments_s),
            transfers=walk.transfers(begin_s),
            bytes_out=sum(sizes),
            bytes_in=sum(sizes),
            disk_bytes=on_disk,
        )

    def stall_s(self, decisions: Iterable[Decision]) -> float:
        """Only what the compute queue waits in one step: all that a search needs to know, in half the time."""
        moves = [decision for decision in decisions if decision.choice is not Choice.KEEP]
        stalls_s, _ = _Walk(self, moves).settle()
        return float(stalls_s.sum())


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


class _Walk:
    """The compute clock on its way through the moments, with the queues behind it."""

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
