"""Bound: a step time that no plan of moves can beat."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from torchlms.core.curve import baseline_curve, wraps

if TYPE_CHECKING:
    from torchlms.core.curve import Seconds
    from torchlms.core.machine import Machine
    from torchlms.core.packing import Ints
    from torchlms.core.plan import Budget
    from torchlms.core.tape import Tape

# Ops over the budget that are looked at, worst first. Each gives a valid bound; more give a better one.
LOOKED_AT = 64


def lower_bound(tape: Tape, machine: Machine, budget: Budget) -> float:
    """Seconds below which no plan that only moves values (none around the end) can bring a step.

    During an op whose excess over the budget is x, at least x bytes are away. Of these, all but what
    began its idle stretch before moment s were copied out after s; all but what is needed only after
    moment s are copied back before s, and not before the op has ended. Copies are taken at the best
    rate the link (without a link, the disk) shows at any size. Not counted: contention, the order of
    copies, the host budget.
    """
    moments_s = np.concatenate(([0.0], np.cumsum([op.time_s for op in tape.ops])))
    excess = baseline_curve(tape) - budget.device_bytes
    over = np.flatnonzero(excess > 0)
    worst = over[np.argsort(-excess[over], kind="stable")][:LOOKED_AT]
    idle = [
        (stretch.start, stretch.stop, value.size_bytes)
        for value in tape.values
        if value.movable
        for stretch in value.idle
        if not wraps(stretch)
    ]
    starts, stops, sizes = (
        np.array(column, dtype=np.int64) for column in (zip(*idle, strict=True) if idle else ((), (), ()))
    )
    out_rate, in_rate = _best_rates(machine)
    compute_s = float(moments_s[-1])
    bound_s = compute_s
    for op in worst:
        here = (starts <= op) & (stops > op)
        out_s = _wait_s(
            starts[here], sizes[here], int(excess[op]), out_rate, moments_s[op] - moments_s[starts[here]]
        )
        in_s = _wait_s(
            -stops[here], sizes[here], int(excess[op]), in_rate, moments_s[stops[here]] - moments_s[op + 1]
        )
        bound_s = max(bound_s, compute_s + out_s + in_s)
    return bound_s


def _wait_s(keys: Ints, sizes: Ints, excess_bytes: int, rate: float, window_s: Seconds) -> float:
    """The least stall on one side of an op: what must cross in a window, less the window, at its worst.

    The window of an entry runs between it and the op; entries with a smaller key lie outside it.
    """
    order = np.argsort(keys, kind="stable")
    before = np.concatenate(([0], np.cumsum(sizes[order])))
    outside_bytes = before[np.searchsorted(keys[order], keys, side="left")]
    inside_bytes = np.maximum(excess_bytes - outside_bytes, 0)
    waits_s = np.where(inside_bytes > 0, inside_bytes / rate - window_s, 0.0)
    return float(waits_s.max(initial=0.0))


def _best_rates(machine: Machine) -> tuple[float, float]:
    """Most bytes per second out and in, at any copy size."""
    if not machine.link:
        return machine.disk_write_bytes_per_s or math.inf, machine.disk_read_bytes_per_s or math.inf
    return (
        max(point.size_bytes / point.out_s if point.out_s > 0 else math.inf for point in machine.link),
        max(point.size_bytes / point.in_s if point.in_s > 0 else math.inf for point in machine.link),
    )
