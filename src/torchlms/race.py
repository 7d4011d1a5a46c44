"""Race: plans for one routine that are tried one after the other; the fastest one stays."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchlms.core.calibrate import AS_MEASURED, Rates

if TYPE_CHECKING:
    from torchlms.core.plan import Plan
    from torchlms.eager.program import Program
    from torchlms.eager.timer import Lap

WARM_LAPS = 2  # under a plan before it is timed
TIMED_LAPS = 4
CLOSE = 1.1  # a plan predicted to be slower by more than that is not tried
FASTER = 0.99  # of the time of the plan before: less is noise
BEHIND = 2  # laps that the device may be behind the program before it is waited for


@dataclass(slots=True)
class Contender:
    """One plan, why it is in the race, how long its laps took, and what was learned of it while it ran."""

    plan: Plan
    name: str
    rates: Rates = AS_MEASURED  # that it was made for
    laps_s: list[float] = field(default_factory=list)
    program: Program | None = None
    starved_laps: int = 0  # in which the device mostly waited for the program
    remapped_laps: int = 0  # in which the allocator remapped memory
    values_s: list[float] = field(default_factory=list)  # by the program in each lap on values that leave
    again_s: list[float] = field(default_factory=list)  # and on making some of them again
    ahead: deque[tuple[Lap, bool]] = field(default_factory=deque)  # laps that the device is not yet past

    def ran(self, lap: Lap, *, remapped: bool) -> None:
        """The program is past a lap. Its time is taken once the device is, too: a program that does not wait
        for its device must not wait for that either, or it would not be timed as it runs."""
        self.ahead.append((lap, remapped))
        while self.ahead and (len(self.ahead) > BEHIND or self.ahead[0][0].passed):
            self._take(*self.ahead.popleft())

    def _take(self, lap: Lap, remapped: bool) -> None:
        measured_s = lap.seconds
        if measured_s is None:
            return
        self.laps_s.append(measured_s)
        self.starved_laps += lap.starved
        self.values_s.append(lap.values_s)
        self.again_s.append(lap.again_s)
        self.remapped_laps += remapped

    @property
    def median_s(self) -> float:
        return statistics.median(self.laps_s[WARM_LAPS:])

    @property
    def starved(self) -> bool:
        """Whether in most laps the device waited for the program."""
        return 2 * self.starved_laps > len(self.laps_s)

    @property
    def remapped(self) -> bool:
        """Whether it did so in most laps."""
        return 2 * self.remapped_laps > len(self.laps_s)

    @property
    def spent_s(self) -> tuple[float, float] | None:
        """What values that leave, and making some of them again, take the program in a lap; None where the
        device does not wait for that."""
        if not self.starved or not self.plan.moves:
            return None
        return statistics.median(self.values_s), statistics.median(self.again_s)

    @property
    def done(self) -> bool:
        return len(self.laps_s) >= WARM_LAPS + TIMED_LAPS

    def forget_laps(self) -> None:
        """Be timed anew."""
        for noted in (self.laps_s, self.values_s, self.again_s, self.ahead):
            noted.clear()
        self.starved_laps = self.remapped_laps = 0


@dataclass(slots=True)
class Race:
    """``contenders`` in the order in which they run; the last one is running."""

    contenders: list[Contender]
    rates: Rates = AS_MEASURED  # that explain the times measured
    felt_heat: bool = False  # the ops have been timed once more
    calibrations: int = 0
    roomier: bool = False  # a plan with more room has been asked for
    confirming: bool = False  # the winner runs once more, for its times were not as predicted
    over: bool = False

    @property
    def first(self) -> Plan:
        """The plan that the others are tried against."""
        return self.contenders[0].plan

    @property
    def running(self) -> Contender:
        return self.contenders[-1]

    def knows(self, plan: Plan) -> bool:
        """Whether a plan that does the same has run already."""
        return any(_done(plan) == _done(contender.plan) for contender in self.contenders)

    def grow(self, program: Program, more_bytes: int) -> None:
        """Have ``program``, which runs, and those that ran before it take in that a step begins with more."""
        plan = program.plan
        for contender in self.contenders:
            if contender.program is not None and contender.program is not program:
                contender.program.grow(more_bytes)
                contender.plan = contender.program.plan
        program.grow(more_bytes)
        if self.running.plan is plan:
            self.running.plan = program.plan

    def winner(self) -> Contender:
        """The first contender, unless a later one was faster by more than noise."""
        best = self.contenders[0]
        for other in self.contenders[1:]:
            if other.done and other.median_s < FASTER * best.median_s:
                best = other
        return best

    def result(self) -> str:
        """In one line."""
        done = [entry for entry in self.contenders if entry.done]
        times = ", ".join(f"{entry.name} {entry.median_s * 1e3:.1f} ms" for entry in done)
        return f"raced {len(done)} plans, forward and backward: {times}; {self.winner().name} stays"


def _done(plan: Plan) -> list[tuple[int, int, str, int, int, bool]]:
    """What ``plan`` does: in no order, wherever it puts the bytes, and for whatever reason."""
    return sorted(
        (move.value, move.stretch, move.choice.value, move.release_op, move.reload_op, move.passing)
        for move in plan.moves
    )
