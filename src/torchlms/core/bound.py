"""Bound: a step time that no plan can beat."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from torchlms.core.curve import baseline_curve, wraps
from torchlms.core.drops import droppable, dropped_while, replay_s

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.core.curve import Seconds
    from torchlms.core.machine import Machine
    from torchlms.core.packing import Ints
    from torchlms.core.plan import Budget
    from torchlms.core.tape import Tape

# Ops over the budget that are looked at, worst first. Each gives a valid bound; more give a better one.
LOOKED_AT = 64
LOOKED_AT_WITH_DROPS = 12
SPLITS = 24  # of the excess between drops and moves


def lower_bound(tape: Tape, machine: Machine, budget: Budget, *, recompute: bool = False) -> float:
    """Seconds below which no plan that only moves values (none around the end) can bring a step; with
    ``recompute``, none that moves and drops them.

    During an op whose excess over the budget is x, at least x bytes are away. Of these, all but what
    began its idle stretch before moment s were copied out after s; all but what is needed only after
    moment s are copied back before s, and not before the op has ended. Copies are taken at the best
    rate the link (without a link, the disk) shows at any size. Bytes dropped instead cost what the
    cheapest recipes of values that are idle then take, after the op, where copies back may go on beside
    them. Not counted: contention, the order of copies, the host budget, what must be present to make values
    again.
    """
    moments_s = np.concatenate(([0.0], np.cumsum([op.time_s for op in tape.ops])))
    excess = baseline_curve(tape) - budget.device_bytes
    over = np.flatnonzero(excess > 0)
    worst = over[np.argsort(-excess[over], kind="stable")][: LOOKED_AT_WITH_DROPS if recompute else LOOKED_AT]
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
        since_s, until_s = moments_s[op] - moments_s[starts[here]], moments_s[stops[here]] - moments_s[op + 1]

        def stalls_s(
            moved_bytes: int, here: Any = here, since_s: Seconds = since_s, until_s: Seconds = until_s
        ) -> tuple[float, float]:
            """What moving so many bytes past the op costs at the least, before it and after it."""
            out_s = _wait_s(starts[here], sizes[here], moved_bytes, out_rate, since_s)
            return out_s, _wait_s(-stops[here], sizes[here], moved_bytes, in_rate, until_s)

        costs = _drop_costs(tape, int(op)) if recompute else []
        bound_s = max(bound_s, compute_s + _least_s(stalls_s, costs, int(excess[op])))
    return bound_s


def _drop_costs(tape: Tape, op: int) -> list[tuple[float, int]]:
    """Seconds a byte and bytes of what may be dropped and is idle during ``op``, cheapest first."""
    found = [
        (replay_s(tape, value) / value.size_bytes, value.size_bytes)
        for value in tape.values
        if droppable(tape, value) and dropped_while(value).start <= op < dropped_while(value).stop
    ]
    return sorted(found)


def _least_s(
    stalls_s: Callable[[int], tuple[float, float]], costs: list[tuple[float, int]], excess_bytes: int
) -> float:
    """The least over all ways to split the excess between drops and moves.

    Drops get dearer with every byte and moves cheaper with every byte less, so that on each of some
    intervals the one's least and the other's least are a bound.
    """

    def split_s(least_bytes: int, most_bytes: int) -> float:
        """With between so many bytes dropped."""
        out_s, in_s = stalls_s(excess_bytes - most_bytes)
        return out_s + max(_dropping_s(costs, least_bytes), in_s)

    most = min(excess_bytes, sum(size for _, size in costs))
    if not most:
        return sum(stalls_s(excess_bytes))
    edges = [most * part // SPLITS for part in range(SPLITS + 1)]
    return min(split_s(low, high) for low, high in zip(edges, [*edges[1:], most], strict=True))


def _dropping_s(costs: list[tuple[float, int]], dropped_bytes: int) -> float:
    """Seconds for dropping so many bytes, parts of values allowed."""
    total_s, left = 0.0, dropped_bytes
    for rate, size in costs:
        taken = min(left, size)
        total_s += rate * taken
        left -= taken
        if not left:
            break
    return total_s


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
