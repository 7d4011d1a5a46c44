"""Pace: what the program itself takes, in Python, to call the ops of a step.

A device that is quicker than that waits for the program. Each value that leaves takes the program some time:
it is sent and fetched, or its history is kept and gone through again, op by op. Then few large values are
better than many small ones, and short histories better than long ones, also where the device would have it
otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchlms.core.drops import Drops
from torchlms.core.tape import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchlms.core.plan import Decision, Prediction
    from torchlms.core.tape import Tape, Value


@dataclass(frozen=True, slots=True)
class Load:
    """What the program does beside the ops of a step: values that leave, and ops that run again."""

    leaving: int = 0
    again: int = 0

    @staticmethod
    def of(tape: Tape, moves: Iterable[Decision]) -> Load:
        """The load of a plan for ``tape`` that ``moves`` values."""
        moves = tuple(moves)
        made = Drops.of(tape, moves).through
        return Load(len(moves), sum(len(value.recipe) for value in made))


@dataclass(frozen=True, slots=True)
class Pace:
    """Of forward and backward: ``base_s`` if nothing leaves, ``each_s`` more for each value that does, and
    ``again_s`` for each op that makes one of them again."""

    base_s: float
    each_s: float
    again_s: float = 0.0

    def lap_s(self, load: Load) -> float:
        """What forward and backward take at least under such a load."""
        return self.base_s + self.each_s * load.leaving + self.again_s * load.again

    def drop_s(self, value: Value) -> float:
        """What dropping ``value`` takes the program."""
        return self.each_s + self.again_s * len(value.recipe)

    def __str__(self) -> str:
        again = f" and {self.again_s * 1e6:.0f} us for each op that runs again" if self.again_s else ""
        return (
            f"the program taken to need {self.base_s * 1e3:.1f} ms{',' if again else ' and'} "
            f"{self.each_s * 1e6:.0f} us for each value that leaves{again}"
        )


# Of what each value that leaves, and each op that runs again, takes the program: counted also where it may
# well have that time.
NOTICED = Pace(0.0, 2e-5, 2e-5)


def lap_s(tape: Tape, step_s: float) -> float:
    """Of a step, the seconds from its first saved tensor to the end of backward."""
    return step_s - sum(op.time_s for op in tape.ops if op.phase is Phase.BETWEEN)


def waits_s(step_s: float, tape: Tape, pace: Pace | None, load: Load) -> float:
    """What the device waits in a step, beside all else, for a program of that pace."""
    return max(0.0, pace.lap_s(load) - lap_s(tape, step_s)) if pace is not None else 0.0


def paced(predicted: Prediction, tape: Tape, pace: Pace | None, load: Load) -> Prediction:
    """``predicted``, if the device also waits for a program of that pace."""
    more_s = waits_s(predicted.step_s, tape, pace, load)
    return replace(predicted, step_s=predicted.step_s + more_s, stall_s=predicted.stall_s + more_s)
