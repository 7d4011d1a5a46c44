"""Times: op times without what measuring them cost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torchlms.core.tape import Tape
    from torchlms.fit.scale import Scale

_MOST_TOLL_S = 50e-6  # that two marks cost
# Below this share of the growth that the batch would ask for, the device waited for the program.
_BUSY = 0.5
_OUTGROWN = 1.25  # times as long as in proportion to the batch


def eased(tape: Tape, step_s: float) -> Tape:
    """``tape`` with op times that add up to ``step_s``, the duration of a step that nobody watched.

    Marks around every op cost each the same few microseconds on the queue, which short ops show and
    long ones hide. So the same is taken from every op, at most all of its time; or, where the step is
    longer than its ops, given to every op. What microseconds cannot explain, such as a device that was
    slower while it was measured, changes all ops by the same factor.
    """
    times_s = np.array([op.time_s for op in tape.ops])
    if not len(times_s):
        return tape
    toll_s = float(np.clip(_toll_s(times_s, step_s), -_MOST_TOLL_S, _MOST_TOLL_S))
    eased_s = np.maximum(times_s - toll_s, 0.0)
    eased_s *= step_s / max(float(eased_s.sum()), 1e-12)
    ops = (replace(op, time_s=float(time_s)) for op, time_s in zip(tape.ops, eased_s, strict=True))
    return replace(tape, ops=tuple(ops))


def _toll_s(times_s: np.typing.NDArray[np.float64], step_s: float) -> float:
    """The seconds to take from each, so that what is left adds up to ``step_s``."""
    if step_s >= times_s.sum():
        return float(times_s.sum() - step_s) / len(times_s)
    falling = np.sort(times_s)[::-1]
    # If only the k longest keep something, the toll is this; it is right where it spares exactly k.
    tolls_s = (np.cumsum(falling) - step_s) / np.arange(1, len(falling) + 1)
    return float(tolls_s[np.flatnonzero(falling > tolls_s)[-1]])


def kept_busy(scale: Scale) -> bool:
    """Whether the step grew with its batch, as it does on a busy device."""
    small_s, large_s = _steps_s(scale)
    asked = scale.large_batch / scale.small_batch - 1
    return large_s - small_s >= _BUSY * asked * small_s


def outgrew_its_batch(scale: Scale) -> bool:
    """Whether the step grew by far more than its batch, as where other work was in the way of one."""
    small_s, large_s = _steps_s(scale)
    return large_s > _OUTGROWN * small_s * scale.large_batch / scale.small_batch


def _steps_s(scale: Scale) -> tuple[float, float]:
    """What the step took at the smaller batch, and at the larger."""
    return sum(op.time_s for op in scale.small.ops), sum(op.time_s for op in scale.large.ops)
