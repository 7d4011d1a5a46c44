"""Explain: ``torchlms plan``: a plan made from files, and the reason for each of its decisions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchlms.core.bound import lower_bound
from torchlms.core.rules import Rules
from torchlms.fit.outlook import planned
from torchlms.fit.question import Question, gather
from torchlms.report import plan_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.core.plan import Plan

    Write = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PlanOrder:
    """What ``torchlms plan`` was asked for: a question of one tape, and what becomes of the plan."""

    question: Question
    recompute: bool = True
    save: Path | None = None


def make_plan(order: PlanOrder, write: Write) -> Plan:
    """Plan the tape as LMS would, and say what was decided. Raises BudgetTooSmall and HostBudgetTooSmall
    where there is no plan, PlanMismatch and BadOption for files that cannot be read."""
    evidence = gather(order.question, write)
    rules = Rules(recompute=order.recompute)
    plan = planned(evidence.tape, evidence.machine, evidence.budget, rules)
    bound_s = lower_bound(evidence.tape, evidence.machine, evidence.budget, recompute=order.recompute)
    write(plan_text(evidence.tape, plan, bound_s))
    if order.save is not None:
        plan.save(order.save)
        write(f"wrote {order.save}: give it to LMS(plan=...) or torchlms bench --plan")
    return plan
