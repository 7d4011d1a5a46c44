"""Value rows: each value of a step, what was chosen for it and why."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from torchlms.core.plan import Choice
from torchlms.core.tape import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.core.plan import Decision
    from torchlms.core.tape import Value
    from torchlms.report_page.step import Step

MOST_ROWS = 1200
_NO_REASON = "may leave; the plan does not need it to"
_LASTING = (Kind.PARAMETER, Kind.BUFFER, Kind.STATE)


@dataclass(frozen=True, slots=True)
class ValueRow:
    """``idle_s`` is the longest time that it lies idle: of the ops in between, without their waits."""

    module: str
    op: str
    kind: str
    size_bytes: int
    choice: str
    idle_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """Bytes of the values made in a module and in those below it, by choice."""

    module: str
    values: int
    size_bytes: dict[str, int]


def value_rows(step: Step) -> tuple[ValueRow, ...]:
    """Values that autograd saved, or that leave; the largest first. All others only come and go."""
    moments_s = list(accumulate((op.time_s for op in step.tape.ops), initial=0.0))
    decisions = {move.value: move for move in (*step.moves, *step.drops)}
    rows = [
        _row(moments_s, value, decisions.get(value.id))
        for value in step.recorded.values
        if value.id in decisions or value.movable or value.saved >= 0 or value.kind in _LASTING
    ]
    return tuple(sorted(rows, key=lambda row: -row.size_bytes))


def module_rows(rows: Sequence[ValueRow], *, depth: int = 1) -> tuple[ModuleRow, ...]:
    """The same by module, cut after ``depth`` names; the largest first."""
    found: dict[str, list[ValueRow]] = {}
    for row in rows:
        found.setdefault(".".join(row.module.split(".")[:depth]), []).append(row)
    made = [
        ModuleRow(
            module,
            len(inside),
            {
                choice.value: sum(row.size_bytes for row in inside if row.choice == choice.value)
                for choice in Choice
            },
        )
        for module, inside in found.items()
    ]
    return tuple(sorted(made, key=lambda row: -sum(row.size_bytes.values())))


def _row(moments_s: Sequence[float], value: Value, decision: Decision | None) -> ValueRow:
    choice = decision.choice if decision is not None else Choice.KEEP
    return ValueRow(
        value.module,
        value.op,
        value.kind.value,
        value.size_bytes,
        choice.value,
        _idle_s(moments_s, value),
        decision.reason if decision is not None else value.why_not or _why_kept(value),
    )


def _why_kept(value: Value) -> str:
    if value.movable:
        return _NO_REASON
    return (
        "does not move in this version" if value.kind in _LASTING else "never idle, or not saved for backward"
    )


def _idle_s(moments_s: Sequence[float], value: Value) -> float:
    """Of its longest stretch, waits for copies not counted, as in the planner's reasons."""
    last = len(moments_s) - 1
    spans = [
        moments_s[stop if start < stop else last] - moments_s[start]
        for start, stop in ((stretch.start, min(stretch.stop, last)) for stretch in value.idle)
        if start <= last
    ]
    return max(spans, default=0.0)
