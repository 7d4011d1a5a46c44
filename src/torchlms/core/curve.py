"""Memory curves: device bytes at each op of a tape, with nothing, everything or chosen values away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from torchlms.core.plan import Choice

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchlms.core.plan import Decision
    from torchlms.core.tape import Stretch, Tape

Bytes = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]


def wraps(stretch: Stretch) -> bool:
    """Whether the stretch runs around the end of the tape."""
    return stretch.stop <= stretch.start


def baseline_curve(tape: Tape) -> Bytes:
    """Bytes at each op when nothing moves."""
    count = len(tape.ops)
    births = [max(value.birth, 0) for value in tape.values]
    ends = [value.death + 1 for value in tape.values]
    sizes = [value.size_bytes for value in tape.values]
    scratch = np.array([op.scratch_bytes for op in tape.ops], dtype=np.int64)
    return tape.resident_bytes + scratch + occupancy(count, births, ends, sizes)


def peak_bytes(tape: Tape) -> int:
    """The most bytes in use at once when nothing moves."""
    return int(baseline_curve(tape).max(initial=0))


def before_bytes(tape: Tape) -> int:
    """What is on the device before a step begins."""
    return tape.resident_bytes + sum(value.size_bytes for value in tape.values if value.birth < 0)


def rise_bytes(tape: Tape) -> int:
    """How much more memory a step takes at its peak than before it begins."""
    return max(0, peak_bytes(tape) - before_bytes(tape))


def memory_curve(tape: Tape, decisions: Iterable[Decision], *, baseline: Bytes | None = None) -> Bytes:
    """Bytes at each op under ``decisions``; a moved value is absent from its release to its reload."""
    away = [decision for decision in decisions if decision.choice is not Choice.KEEP]
    curve = baseline_curve(tape) if baseline is None else baseline
    return curve - ring_occupancy(
        len(tape.ops),
        [decision.release_op for decision in away],
        [decision.reload_op for decision in away],
        [tape.values[decision.value].size_bytes for decision in away],
    )


def floor_curve(tape: Tape, *, wrapping: bool = False) -> Bytes:
    """Bytes at each op with every movable value absent through every whole idle stretch.

    No plan of moves gets below it. Stretches that wrap around the end count only with ``wrapping``,
    because this version's planner leaves them alone.
    """
    idle = [
        (stretch, value.size_bytes)
        for value in tape.values
        if value.movable
        for stretch in value.idle
        if wrapping or not wraps(stretch)
    ]
    return baseline_curve(tape) - ring_occupancy(
        len(tape.ops),
        [stretch.start for stretch, _ in idle],
        [stretch.stop for stretch, _ in idle],
        [size_bytes for _, size_bytes in idle],
    )


def smallest_budget(tape: Tape) -> int:
    """The smallest device budget for which a plan of moves exists (without rules or headroom)."""
    return int(floor_curve(tape).max(initial=0))


def occupancy(count: int, starts: Sequence[int], stops: Sequence[int], sizes: Sequence[int]) -> Bytes:
    """Sum of the sizes over ``start <= i < stop`` for each ``0 <= i < count``."""
    steps = np.zeros(count + 1, dtype=np.int64)
    weights = np.array(sizes, dtype=np.int64)
    np.add.at(steps, _within(starts, count), weights)
    np.subtract.at(steps, _within(stops, count), weights)
    return np.asarray(steps[:-1].cumsum(), dtype=np.int64)


def ring_occupancy(count: int, starts: list[int], stops: list[int], sizes: list[int]) -> Bytes:
    """As ``occupancy``, but ``stop <= start`` means around the end."""
    turned = sum(size for start, stop, size in zip(starts, stops, sizes, strict=True) if stop <= start)
    return occupancy(count, starts, stops, sizes) + turned


def _within(ops: Sequence[int], count: int) -> Bytes:
    """What ``np.clip`` to 0 and ``count`` gives, which takes longer than all else for a few ops."""
    return np.minimum(np.maximum(np.array(ops, dtype=np.int64), 0), count)
