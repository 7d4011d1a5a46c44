"""Curve: step time against device budget, for one tape on one machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchlms.core.bound import lower_bound
from torchlms.core.curve import peak_bytes, smallest_budget
from torchlms.core.headroom import budget_for
from torchlms.core.plan import Budget
from torchlms.fit.outlook import NO_RULES, look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.core.machine import Machine
    from torchlms.core.rules import Rules
    from torchlms.core.tape import Tape

POINTS = 12


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What is predicted at one budget. ``speed`` is the share of the speed without a budget.

    ``lower_bound_s`` is a step time that no plan can beat at this budget.
    """

    budget_bytes: int
    peak_device_bytes: int
    step_s: float
    stall_s: float
    bytes_out: int
    lower_bound_s: float
    speed: float


def curve(
    tape: Tape,
    machine: Machine,
    budget: Budget,
    budgets_bytes: Sequence[int] | None = None,
    *,
    rules: Rules = NO_RULES,
) -> tuple[CurvePoint, ...]:
    """A point per budget, smallest budget first; budgets that do not work have none.

    Host memory and disk are those of ``budget``. The step time never rises with the budget: what was
    planned for a smaller one may be used under a larger.
    """
    budgets_bytes = default_budgets(tape, machine) if budgets_bytes is None else budgets_bytes
    points: list[CurvePoint] = []
    for device_bytes in sorted(set(budgets_bytes)):
        here = replace(budget, device_bytes=device_bytes)
        outlook = look(tape, machine, here, rules)
        if outlook.predicted is None:
            continue
        predicted = outlook.predicted
        point = CurvePoint(
            budget_bytes=device_bytes,
            peak_device_bytes=predicted.peak_device_bytes,
            step_s=predicted.step_s,
            stall_s=predicted.stall_s,
            bytes_out=predicted.bytes_out,
            lower_bound_s=lower_bound(tape, machine, here, recompute=rules.recompute),
            speed=outlook.speed,
        )
        if points and points[-1].step_s < point.step_s:
            point = replace(points[-1], budget_bytes=device_bytes, lower_bound_s=point.lower_bound_s)
        points.append(point)
    return tuple(points)


def default_budgets(tape: Tape, machine: Machine, points: int = POINTS) -> tuple[int, ...]:
    """Evenly from the smallest budget that works to the one under which nothing moves."""
    low = smallest_budget(tape)
    high = budget_for(machine, peak_bytes(tape))
    if high <= low or points < 2:
        return (high,)
    return tuple(low + (high - low) * step // (points - 1) for step in range(points))
