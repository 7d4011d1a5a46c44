"""Outlook: what is predicted of one step under one budget, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from torchlms.core import joint, planner
from torchlms.core.curve import baseline_curve, floor_curve
from torchlms.core.headroom import ELBOW, NO_ELBOW, headroom_bytes
from torchlms.core.plan import Budget, Plan, Prediction
from torchlms.core.rules import Rules
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall

if TYPE_CHECKING:
    from torchlms.core.machine import Machine
    from torchlms.core.tape import Tape


NO_RULES = Rules()


class Verdict(str, Enum):
    """Whether a step fits."""

    FITS = "fits"
    MOVES = "moves"  # fits, with values elsewhere for part of the step
    TOO_SMALL = "too_small"  # one op needs more than the budget at once
    HOST_TOO_SMALL = "host_too_small"  # what must leave has nowhere to go


@dataclass(frozen=True, slots=True)
class Narrow:
    """The op that needs most with everything away that can be: it sets the smallest budget."""

    op: int
    name: str
    module: str
    needs_bytes: int
    operands_bytes: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """One step under one budget. ``predicted`` is None where it does not fit.

    ``plain_bytes`` is what the step needs at once with nothing moved, ``plain_s`` how long it takes
    then, ``missing_bytes`` what host memory and disk lack.
    """

    verdict: Verdict
    budget: Budget
    plain_bytes: int
    plain_s: float
    narrow: Narrow
    predicted: Prediction | None = None
    missing_bytes: int = 0

    @property
    def works(self) -> bool:
        """Whether the step runs at all."""
        return self.predicted is not None

    @property
    def speed(self) -> float:
        """Share of the speed without a budget; 0 where the step does not run."""
        if self.predicted is None:
            return 0.0
        return self.predicted.compute_s / self.predicted.step_s if self.predicted.step_s > 0 else 1.0

    @property
    def smallest_bytes(self) -> int:
        """The smallest device budget that works."""
        return self.narrow.needs_bytes


def look(tape: Tape, machine: Machine, budget: Budget) -> Outlook:
    """What becomes of ``tape`` under ``budget`` on ``machine``. Raises nothing for want of memory."""
    plain_bytes, plain_s = plain_peak_bytes(tape), sum(op.time_s for op in tape.ops)
    narrow = narrowest(tape)
    try:
        predicted = planned(tape, machine, budget)
    except BudgetTooSmall:
        return Outlook(Verdict.TOO_SMALL, budget, plain_bytes, plain_s, narrow)
    except HostBudgetTooSmall as error:
        return Outlook(
            Verdict.HOST_TOO_SMALL, budget, plain_bytes, plain_s, narrow, missing_bytes=error.missing_bytes
        )
    verdict = Verdict.MOVES if predicted.moves else Verdict.FITS
    return Outlook(verdict, budget, plain_bytes, plain_s, narrow, predicted.predicted)


def planned(tape: Tape, machine: Machine, budget: Budget, rules: Rules = NO_RULES) -> Plan:
    """The plan that LMS would begin with: with room for holes where it has some, else without."""
    make_plan = joint.plan if rules.recompute else planner.plan
    try:
        return make_plan(
            tape,
            machine,
            budget,
            rules,
            headroom_bytes=headroom_bytes(machine, budget.device_bytes),
            elbow=ELBOW if machine.link else NO_ELBOW,
        )
    except BudgetTooSmall:
        return make_plan(tape, machine, budget, rules)


def plain_peak_bytes(tape: Tape) -> int:
    """The most bytes in use at once with nothing moved."""
    return int(baseline_curve(tape).max(initial=0))


def narrowest(tape: Tape) -> Narrow:
    """Where the memory is needed that nothing can free."""
    floor = floor_curve(tape)
    if not len(floor):
        return Narrow(-1, "", "", tape.resident_bytes, 0)
    worst = int(floor.argmax())
    op = tape.ops[worst]
    operands_bytes = sum(tape.values[value].size_bytes for value in {*op.reads, *op.writes})
    return Narrow(worst, op.name, op.module, int(floor[worst]), operands_bytes + op.scratch_bytes)
