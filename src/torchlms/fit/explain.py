"""Explain: ``torchlms plan``: a plan made from files, and the reason for each of its decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchlms.core.bound import lower_bound
from torchlms.core.record import to_json
from torchlms.core.rules import unmatched
from torchlms.fit.outlook import planned
from torchlms.fit.question import Question, gather
from torchlms.outlet import check_folder
from torchlms.report import plan_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torchlms.core.plan import Plan
    from torchlms.core.tape import Tape

    Write = Callable[[str], None]

SCHEMA = "torchlms.explained/1"


def explain(question: Question, write: Write, *, save: Path | None = None) -> dict[str, Any]:
    """Plan the tape of ``question`` as LMS would, and say what was decided; what is returned is for JSON.

    Raises BudgetTooSmall and HostBudgetTooSmall where there is no plan, PlanMismatch and BadOption for
    files that cannot be read.
    """
    check_folder(save)
    evidence = gather(question, write)
    tape, machine, budget, rules = evidence.tape, evidence.machine, evidence.budget, evidence.rules
    for pattern in unmatched(rules, tape):
        write(f"the rule {pattern} matches nothing in this step: perhaps it is misspelt")
    plan = planned(tape, machine, budget, rules)
    bound_s = lower_bound(tape, machine, budget, recompute=rules.recompute)
    write(plan_text(tape, plan, bound_s, rules))
    if save is not None:
        plan.save(save)
        write(f"wrote {save}: give it to LMS(plan=...) or torchlms bench --plan")
    return figures(tape, plan, bound_s)


def figures(tape: Tape, plan: Plan, bound_s: float) -> dict[str, Any]:
    """The prediction, and each value that leaves with what it is and why."""
    return {
        "schema": SCHEMA,
        "budget_bytes": plan.budget.device_bytes,
        "smallest_bytes": plan.smallest_bytes,
        "bound_s": bound_s,
        "predicted": to_json(plan.predicted),
        "moves": [
            {
                "value": move.value,
                "module": tape.values[move.value].module,
                "op": tape.values[move.value].op,
                "bytes": tape.values[move.value].size_bytes,
                "choice": move.choice.value,
                "reason": move.reason,
            }
            for move in plan.moves
        ],
    }
