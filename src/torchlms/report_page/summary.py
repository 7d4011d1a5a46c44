"""Summary: what the run came to, in a sentence and a small table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from torchlms.core.plan import Choice
from torchlms.core.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from torchlms.report_page.run import Run
    from torchlms.report_page.step import Step

_MISSING = "-"
_WHERE = {Choice.HOST: "to host memory", Choice.DISK: "to disk", Choice.RECOMPUTE: "dropped and made again"}


def headline(run: Run, step: Step) -> str:
    """What the plan does, in a sentence."""
    plain = bytes_text(int(step.plain_bytes.max(initial=0)))
    needs = f"A step of {len(run.tape.ops)} ops that needs {plain}"
    if run.plan is None:
        return f"{needs}. There is no plan: it is shown with nothing moved."
    budget = bytes_text(run.plan.budget.device_bytes)
    if not run.plan.moves:
        return f"{needs} and fits in {budget}: nothing has to leave."
    parts = []
    for choice, where in _WHERE.items():
        values = {move.value for move in run.plan.moves if move.choice is choice}
        if values:
            size_bytes = sum(run.tape.values[value].size_bytes for value in values)
            noun = "value" if len(values) == 1 else "values"
            parts.append(f"{len(values)} {noun} ({bytes_text(size_bytes)}) {where}")
    return f"{needs} runs within {budget}: {', '.join(parts)}."


def comparison(run: Run, step: Step) -> list[tuple[str, str, str]]:
    """What, predicted, measured. Predicted is what the plan says, which may have been corrected since."""
    plan, stats = run.plan, run.stats
    if plan is None:
        return []
    predicted = plan.predicted
    rows = [
        ("step", seconds_text(predicted.step_s), _seconds(stats.get("measured_step_s"))),
        ("of it, ops", seconds_text(predicted.compute_s), _MISSING),
        ("of it, waiting for copies", _seconds(predicted.stall_s), _MISSING),
        ("its ops with nothing moved", seconds_text(step.plain_s), _MISSING),
        ("peak allocated", bytes_text(predicted.peak_device_bytes), _bytes(stats.get("peak_device_bytes"))),
        *_reserved(run),
        ("out per step", bytes_text(predicted.bytes_out), _bytes(stats.get("bytes_out_per_step"))),
        ("back per step", bytes_text(predicted.bytes_in), _bytes(stats.get("bytes_in_per_step"))),
        ("to disk per step", bytes_text(predicted.disk_bytes), _bytes(stats.get("disk_bytes_per_step"))),
        ("host memory", bytes_text(predicted.arena_bytes), _bytes(stats.get("peak_host_bytes"))),
        ("smallest budget that works", bytes_text(plan.smallest_bytes), _MISSING),
        ("planning", _MISSING, seconds_text(plan.plan_s)),
    ]
    return [row for row in rows if not set(row[1:]) <= {"0 bytes", _MISSING}]


def _reserved(run: Run) -> list[tuple[str, str, str]]:
    """Where there is a caching allocator. What it will reserve is said by ``LMS.stats``, not by the plan."""
    if not run.machine.link:
        return []
    predicted = (run.stats.get("predicted") or {}).get("peak_reserved_bytes")
    return [("peak reserved", _bytes(predicted), _bytes(run.stats.get("peak_reserved_bytes")))]


def settings(run: Run) -> list[tuple[str, str]]:
    """Versions, and options that are not their defaults."""
    found = [(name, version) for name, version in run.versions.items() if version]
    for name, value in run.options.items():
        if value:
            found.append((name.replace("_", " "), value if isinstance(value, str) else json.dumps(value)))
    if run.written:
        found.append(("written", run.written))
    return found


def _seconds(value: float | None) -> str:
    return seconds_text(value) if value else _MISSING


def _bytes(value: int | None) -> str:
    return bytes_text(value) if value is not None else _MISSING
