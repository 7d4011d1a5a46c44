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

from torchlms.core.curve import baseline_curve, floor_curve, memory_curve, smallest_budget
from torchlms.core.plan import Choice, Prediction
from torchlms.core.walk import Transfer, Walk

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        walk = Walk(self, moves)
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
        """Only what the compute queue waits in one step: all a search needs to know, in half the time."""
        moves = [decision for decision in decisions if decision.choice is not Choice.KEEP]
        stalls_s, _ = Walk(self, moves).settle()
        return float(stalls_s.sum())
