"""Pace: what the program itself takes, in Python, to call the ops of a step.

A device that is quicker than that waits for the program. Each value that leaves takes the program some time:
it is sent and fetched, or its history is kept and gone through again. Then few large values are better than
many small ones, also where the device would have it otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchlms.core.tape import Phase

if TYPE_CHECKING:
    from torchlms.core.plan import Prediction
    from torchlms.core.tape import Tape


@dataclass(frozen=True, slots=True)
class Pace:
    """Of forward and backward: ``base_s`` if nothing leaves, and ``each_s`` more for each value that does."""

    base_s: float
    each_s: float

    def lap_s(self, leaving: int) -> float:
        """What forward and backward take at least when ``leaving`` values leave."""
        return self.base_s + self.each_s * leaving

    def __str__(self) -> str:
        return (
            f"the program taken to need {self.base_s * 1e3:.1f} ms and {self.each_s * 1e6:.0f} us "
            "for each value that leaves"
        )


def lap_s(tape: Tape, step_s: float) -> float:
    """Of a step, the seconds from its first saved tensor to the end of backward."""
    return step_s - sum(op.time_s for op in tape.ops if op.phase is Phase.BETWEEN)


def paced(predicted: Prediction, tape: Tape, pace: Pace | None, leaving: int) -> Prediction:
    """``predicted``, if the device also has to wait for a program of that pace."""
    waits_s = pace.lap_s(leaving) - lap_s(tape, predicted.step_s) if pace is not None else 0.0
    if waits_s <= 0:
        return predicted
    return replace(predicted, step_s=predicted.step_s + waits_s, stall_s=predicted.stall_s + waits_s)
