"""Planned: a plan of moves, and what its step would take with slower copies.

[Note: Slower copies]
Copies are often slower than they were measured: they share the memory with the ops and the link with others,
and a program that is late issues them late. Where they just fit beside the ops, a step is a hair shorter as
long as all goes well, and by as much longer as they are late otherwise; to move values that idle longer, or
to drop one more, costs next to nothing. So a plan is made for slower copies, and where there is a choice of
several, judged by what its step takes at both speeds, on average. Where it waits for copies all the same
there is little to gain by giving up the faster ones: then one that is made for these is among the several.
What is predicted, and the times in reasons, are those of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchlms.core.pace import paced, waits_s

if TYPE_CHECKING:
    from torchlms.core.pace import Load, Pace
    from torchlms.core.plan import Plan
    from torchlms.core.tape import Tape

SLOWER = 0.8  # as fast as copies are counted on to be, as a share of what was measured
_NO_STALL = 1e-3  # of the compute time: nothing is left to gain


@dataclass(frozen=True, slots=True)
class Speeds:
    """How many times as fast copies are as those that a plan is made for: the machine's, and the slower ones
    that it is judged by as well."""

    machine: float = 1.0
    slower: float = 1.0


def slower(taken: float) -> float:
    """As fast as copies are counted on to be, where they are ``taken`` to be so many times as fast as they
    were measured: a share of that. Nothing is counted on to be slower than ``SLOWER`` of what was measured
    unless it is taken to be."""
    return min(1.0, SLOWER / min(taken, 1.0))


@dataclass(frozen=True, slots=True)
class Planned:
    """``plan`` predicts its step for copies as the machine says; ``slower_step_s`` is that step with the
    slower copies that were counted on. Without such, both are the same."""

    plan: Plan
    slower_step_s: float

    @property
    def step_s(self) -> float:
        """On average of both speeds: what plans are compared by."""
        return (self.plan.predicted.step_s + self.slower_step_s) / 2

    @property
    def stall_s(self) -> float:
        """What the device waits for copies in ``step_s``."""
        return self.step_s - self.plan.predicted.compute_s

    @property
    def waits(self) -> bool:
        """Whether the device waits for copies for so long that more may be tried for it."""
        return self.stall_s > _NO_STALL * self.plan.predicted.compute_s

    def paced(self, tape: Tape, pace: Pace | None, load: Load) -> Planned:
        """The same, if the device also has to wait for a program of that pace."""
        return Planned(
            replace(self.plan, predicted=paced(self.plan.predicted, tape, pace, load)),
            self.slower_step_s + waits_s(self.slower_step_s, tape, pace, load),
        )
