"""Outlook: what is predicted of one step under one budget, before it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from torchlms.core import joint, planner
from torchlms.core.curve import floor_curve, peak_bytes
from torchlms.core.headroom import ELBOW, NO_ELBOW, headroom_bytes
from torchlms.core.plan import Budget, Plan, Prediction
from torchlms.core.rules import Rules, leavers
from torchlms.core.units import rounded_up
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

    ``smallest_bytes`` is the smallest device budget that works, ``plain_bytes`` what the step needs at once
    with nothing moved, ``plain_s`` how long it takes then, ``missing_bytes`` what host memory and disk lack.
    """

    verdict: Verdict
    budget: Budget
    plain_bytes: int
    plain_s: float
    narrow: Narrow
    smallest_bytes: int
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
        return self.plain_s / self.predicted.step_s if self.predicted.step_s > 0 else 1.0


def look(tape: Tape, machine: Machine, budget: Budget, rules: Rules = NO_RULES) -> Outlook:
    """What becomes of ``tape`` under ``budget`` on ``machine``. Raises nothing for want of memory."""
    narrow = narrowest(tape, rules)
    unknown = Outlook(
        verdict=Verdict.TOO_SMALL,
        budget=budget,
        plain_bytes=peak_bytes(tape),
        plain_s=sum(op.time_s for op in tape.ops),
        narrow=narrow,
        smallest_bytes=rounded_up(narrow.needs_bytes + (rules.headroom_bytes or 0)),
    )
    try:
        plan = planned(tape, machine, budget, rules, quick=True)
    except BudgetTooSmall:
        return unknown
    except HostBudgetTooSmall as error:
        return replace(unknown, verdict=Verdict.HOST_TOO_SMALL, missing_bytes=error.missing_bytes)
    verdict = Verdict.MOVES if plan.moves else Verdict.FITS
    return replace(unknown, verdict=verdict, predicted=plan.predicted)


def planned(
    tape: Tape, machine: Machine, budget: Budget, rules: Rules = NO_RULES, *, quick: bool = False
) -> Plan:
    """The plan that LMS would begin with: with room for holes where it has some, else without. ``quick``
    tries fewer sets of values to drop, for questions that take many plans to answer."""
    make_plan = partial(joint.plan, quick=quick) if rules.recompute else planner.plan
    asked_bytes, drops = rules.headroom_bytes, rules.recompute
    try:
        return make_plan(
            tape,
            machine,
            budget,
            rules,
            headroom_bytes=headroom_bytes(machine, budget.device_bytes, asked_bytes, drops=drops),
            elbow=ELBOW if machine.link else NO_ELBOW,
        )
    except BudgetTooSmall:
        return make_plan(tape, machine, budget, rules)


def narrowest(tape: Tape, rules: Rules = NO_RULES) -> Narrow:
    """Where the memory is needed that nothing can free, as far as the rules permit."""
    floor = floor_curve(_restrained(tape, rules))
    if not len(floor):
        return Narrow(-1, "", "", tape.resident_bytes, 0)
    worst = int(floor.argmax())
    op = tape.ops[worst]
    operands_bytes = sum(tape.values[value].size_bytes for value in {*op.reads, *op.writes})
    return Narrow(worst, op.name, op.module, int(floor[worst]), operands_bytes + op.scratch_bytes)


def _restrained(tape: Tape, rules: Rules) -> Tape:
    """``tape`` with what the rules keep as if it could not move."""
    leave = leavers(rules, tape)
    values = (
        value if value.id in leave or not value.movable else replace(value, movable=False)
        for value in tape.values
    )
    return replace(tape, values=tuple(values))
