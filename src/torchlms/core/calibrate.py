"""Calibrate: what rates of copying would explain the time that a step has really taken."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torchlms.core.drops import with_drops
from torchlms.core.plan import Choice
from torchlms.core.simulate import Simulator
from torchlms.core.tape import Phase

if TYPE_CHECKING:
    from torchlms.core.machine import Machine
    from torchlms.core.plan import Plan
    from torchlms.core.tape import Tape

FASTEST, SLOWEST = 2.0, 0.25  # times the measured rates: beyond that something else is the matter
_HALVINGS = 12


def lap_s(tape: Tape, step_s: float) -> float:
    """Of a step, the seconds from its first saved tensor to the end of backward."""
    return step_s - sum(op.time_s for op in tape.ops if op.phase is Phase.BETWEEN)


def scaled(machine: Machine, factor: float) -> Machine:
    """``machine`` if every copy off the device and back went ``factor`` times as fast."""
    return replace(
        machine,
        link=tuple(
            replace(point, out_s=point.out_s / factor, in_s=point.in_s / factor) for point in machine.link
        ),
        disk_write_bytes_per_s=machine.disk_write_bytes_per_s * factor,
        disk_read_bytes_per_s=machine.disk_read_bytes_per_s * factor,
    )


def explaining_factor(tape: Tape, machine: Machine, plan: Plan, measured_lap_s: float) -> float:
    """The factor on all rates of copying with which the simulator comes nearest to the measured time.

    Between ``SLOWEST`` and ``FASTEST``; 1.0 for a plan that copies nothing.
    """
    drops = [tape.values[move.value] for move in plan.moves if move.choice is Choice.RECOMPUTE]
    moves = [move for move in plan.moves if move.choice in (Choice.HOST, Choice.DISK)]
    if not moves:
        return 1.0
    changed = with_drops(tape, drops)

    def predicted_s(factor: float) -> float:
        return lap_s(tape, Simulator(changed, scaled(machine, factor)).run(moves).step_s)

    low, high = SLOWEST, FASTEST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if predicted_s(middle) > measured_lap_s:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5
