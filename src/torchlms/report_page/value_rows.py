"""Value rows: each value of a step, what was chosen for it and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from torchlms.core.drops import droppable, replay_s
from torchlms.core.plan import Choice
from torchlms.core.tape import Kind
from torchlms.core.units import seconds_text
from torchlms.report import why_it_stays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.core.plan import Decision
    from torchlms.core.tape import Stretch, Value
    from torchlms.report_page.step import Step

MOST_ROWS = 1200
_LASTING = (Kind.PARAMETER, Kind.BUFFER, Kind.STATE)


@dataclass(frozen=True, slots=True)
class ValueRow:
    """``idle_s`` is the longest time that it lies idle: of the ops in between, without their waits."""

    value: int
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
    """Values that autograd saved, or that leave; the largest first. All others only come and go. One that
    leaves in several of its idle stretches has a row for each."""
    moments_s = list(accumulate((op.time_s for op in step.tape.ops), initial=0.0))
    decisions: dict[int, list[Decision]] = {}
    for move in (*step.moves, *step.drops):
        decisions.setdefault(move.value, []).append(move)
    rows = [
        _row(step, moments_s, value, decision)
        for value in step.recorded.values
        if value.id in decisions or value.movable or value.saved >= 0 or value.kind in _LASTING
        for decision in decisions.get(value.id, [None])
    ]
    return tuple(sorted(rows, key=lambda row: -row.size_bytes))


def module_rows(rows: Sequence[ValueRow], *, depth: int = 1) -> tuple[ModuleRow, ...]:
    """The same by module, cut after ``depth`` names; the largest first."""
    found: dict[str, list[ValueRow]] = {}
    once = {row.value: row for row in reversed(rows)}
    for row in once.values():
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


def _row(step: Step, moments_s: Sequence[float], value: Value, decision: Decision | None) -> ValueRow:
    # Where a value is made again, its sources have to be there: their stretches end earlier on that tape.
    idle = step.tape.values[value.id].idle or value.idle
    if decision is not None and decision.stretch < len(idle):
        idle = (idle[decision.stretch],)
    idle_s = _idle_s(moments_s, idle)
    return ValueRow(
        value.id,
        value.module,
        value.op,
        value.kind.value,
        value.size_bytes,
        (decision.choice if decision is not None else Choice.KEEP).value,
        idle_s,
        decision.reason if decision is not None else _why_kept(step, value, idle_s),
    )


def _why_kept(step: Step, value: Value, idle_s: float) -> str:
    if value.movable or value.why_not:
        why = why_it_stays(value, step.ruled, step.least_bytes, some_go=bool(step.moves or step.drops))
        free = value.movable and value.id not in step.ruled
        return f"{why}: {_to_go(step, value, idle_s)}" if free else why
    if value.kind in _LASTING:
        return "does not move in this version"
    return "never idle, or not saved for backward"


def _to_go(step: Step, value: Value, idle_s: float) -> str:
    """What it would take for the value to leave."""
    said = [f"idle {seconds_text(idle_s)}"]
    copies_s = step.machine.copies_s(value.size_bytes)
    if math.isfinite(copies_s):
        said.append(f"copies {seconds_text(copies_s)}")
    if droppable(step.recorded, value):
        said.append(f"making it again {seconds_text(replay_s(step.recorded, value))}")
    return ", ".join(said)


def _idle_s(moments_s: Sequence[float], idle: Sequence[Stretch]) -> float:
    """Of its longest stretch, waits for copies not counted, as in the planner's reasons."""
    last = len(moments_s) - 1
    spans = [
        moments_s[stop if start < stop else last] - moments_s[start]
        for start, stop in ((stretch.start, min(stretch.stop, last)) for stretch in idle)
        if start <= last
    ]
    return max(spans, default=0.0)
