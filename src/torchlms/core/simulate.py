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
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from torchlms.core.curve import (
    baseline_curve,
    floor_curve,
    memory_curve,
    ring_occupancy,
    smallest_budget,
    wraps,
)
from torchlms.core.moves import Move, Slot
from torchlms.core.plan import Choice, Prediction
from torchlms.core.walk import Transfer, Walk
from torchlms.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchlms.core.curve import Bytes, Seconds
    from torchlms.core.machine import Machine
    from torchlms.core.plan import Decision
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


@dataclass(frozen=True, eq=False)
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
    bytes_out: int
    bytes_in: int
    disk_bytes: int
    walk: Walk
    begin_s: float  # of the walk's last lap, by its own clock

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """The copies issued in the step, in order of issue."""
        return self.walk.transfers(self.begin_s)


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
        self._moments_s: list[float] = self.moments_s.tolist()
        self._copy_s: dict[int, tuple[float, float]] = {}

    def copy_s(self, size_bytes: int) -> tuple[float, float]:
        """Lone link seconds out and in; remembered, since sizes repeat."""
        if size_bytes not in self._copy_s:
            self._copy_s[size_bytes] = (self.machine.out_s(size_bytes), self.machine.in_s(size_bytes))
        return self._copy_s[size_bytes]

    def run(self, decisions: Iterable[Decision]) -> Timeline:
        """The timeline of one step."""
        slots, around = self._slots_of(decisions)
        return self.play(slots, around=around)

    def stall_s(self, decisions: Iterable[Decision]) -> float:
        """Only what the compute queue waits in one step."""
        slots, around = self._slots_of(decisions)
        return self.stall_of(slots, around=around)

    def play(self, slots: Sequence[Slot], *, around: bool = False, faster: float = 1.0) -> Timeline:
        """``run`` for slots, as a search has them at hand; whether any goes around the end of the tape, and
        how many times as fast copies are as the slots say."""
        sizes = [slot.move.size_bytes for slot in slots]
        away = ring_occupancy(
            len(self.tape.ops), [slot.release_op for slot in slots], [slot.reload_op for slot in slots], sizes
        )
        curve = self.baseline - away
        peak_op = int(curve.argmax()) if len(curve) else -1
        walk = Walk(self.machine, self._moments_s, slots, faster=faster)
        stalls_s, begin_s = walk.settle(around=around)
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
            bytes_out=sum(sizes),
            bytes_in=sum(sizes),
            disk_bytes=sum(slot.move.size_bytes for slot in slots if slot.on_disk),
            walk=walk,
            begin_s=begin_s,
        )

    def stall_of(self, slots: Sequence[Slot], *, around: bool = False, faster: float = 1.0) -> float:
        """``stall_s`` likewise: all a search needs to know, in half the time."""
        stalls_s, _ = Walk(self.machine, self._moments_s, slots, faster=faster).settle(around=around)
        return float(stalls_s.sum())

    def _slots_of(self, decisions: Iterable[Decision]) -> tuple[list[Slot], bool]:
        """A slot for each decision that moves, and whether any goes around the end of the tape."""
        moving = [decision for decision in decisions if decision.choice is not Choice.KEEP]
        around = any(wraps(self.tape.values[decision.value].idle[decision.stretch]) for decision in moving)
        return [self._slot_of(decision) for decision in moving], around

    def _slot_of(self, decision: Decision) -> Slot:
        value, machine = self.tape.values[decision.value], self.machine
        stretch, count = value.idle[decision.stretch], len(self.tape.ops)
        if decision.choice not in (Choice.HOST, Choice.DISK):
            raise NotSupported(f"the simulator cannot yet judge {decision.choice.value} (value {value.id})")
        if decision.choice is Choice.HOST and not machine.link:
            raise NotSupported("HOST means nothing on a machine whose device is the CPU; use DISK")
        on_disk = decision.choice is Choice.DISK
        out_s, in_s = self.copy_s(value.size_bytes)
        move = Move(
            value=value.id,
            stretch=decision.stretch,
            size_bytes=value.size_bytes,
            start=stretch.start % count if wraps(stretch) else stretch.start,
            stop=stretch.stop % count if wraps(stretch) else stretch.stop,
            idle_s=0.0,
            out_s=out_s,
            in_s=in_s,
            write_s=machine.disk_write_s(value.size_bytes) if on_disk else 0.0,
            read_s=machine.disk_read_s(value.size_bytes) if on_disk else 0.0,
        )
        return Slot(move, on_disk, decision.release_op, decision.reload_op)
