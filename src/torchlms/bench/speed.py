"""Speed: what a list of step times says, in the words of tf_cnn_benchmarks."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAD_TO_SIGMA = 1.4826  # makes the median absolute deviation of a normal distribution its sigma


@dataclass(frozen=True, slots=True)
class Speed:
    """Items per second over some steps: ``mean +/- uncertainty (jitter)``.

    ``mean`` is all items over all seconds; ``uncertainty`` is the standard error of the steps'
    own speeds, ``jitter`` their median absolute deviation scaled to a standard deviation.
    """

    mean: float
    uncertainty: float
    jitter: float


def speed(items_per_step: int, step_s: Sequence[float]) -> Speed:
    """The speed of steps that took ``step_s`` seconds each."""
    speeds = [items_per_step / max(seconds, 1e-12) for seconds in step_s]
    middle = statistics.median(speeds)
    return Speed(
        mean=items_per_step * len(speeds) / max(math.fsum(step_s), 1e-12),
        uncertainty=statistics.pstdev(speeds) / math.sqrt(len(speeds)),
        jitter=_MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in speeds),
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of some seconds."""

    median: float
    min: float
    max: float


def spread(step_s: Sequence[float]) -> Spread:
    """How the seconds are spread."""
    return Spread(statistics.median(step_s), min(step_s), max(step_s))
