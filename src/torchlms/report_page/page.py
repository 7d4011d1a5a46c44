"""Page: a run as one HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchlms.core.plan import Choice
from torchlms.core.units import seconds_text
from torchlms.errors import BadOption
from torchlms.memory.limits import format_bytes
from torchlms.report_page.chart import memory_chart, speed_chart, tracks_chart
from torchlms.report_page.course import LAYERS, course_of, speeds

if TYPE_CHECKING:
    from torchlms.core.machine import Machine
    from torchlms.core.plan import Decision
    from torchlms.core.tape import Value
    from torchlms.report_page.record import RunRecord

_TEMPLATE = Path(__file__).with_name("page.html")
_MOST_VALUES = 2000  # the page stays below 2 MB
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of what plain needs
_COLUMNS = (
    ("size", "number"),
    ("choice", ""),
    ("module", ""),
    ("made by", ""),
    ("idle", "number"),
    ("why", ""),
)
_TROUBLE = {
    "reclaims": "times that room had to be made at once",
    "full_reclaims": "of these, times that everything had to leave that could",
    "retries": "ops that ran out of memory and were run again",
    "late_fetches": "values that were not back when they were needed",
    "starved_convolutions": "convolutions that found no room for their workspace: slower, other bits",
    "replans": "plans made anew because steps under the plan had to make room",
    "strayed": "steps that were not those of the plan",
}


@dataclass(frozen=True, slots=True)
class Line:
    """A figure with its name, and what there is to say of it."""

    name: str
    figure: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One value of the table."""

    size: str
    size_bytes: int
    choice: str
    module: str
    op: str
    idle: str
    idle_s: float
    reason: str


def page(record: RunRecord) -> str:
    """The HTML. BadOption if jinja2, which fills the page in, is not there."""
    try:
        from jinja2 import Environment
        from markupsafe import Markup
    except ImportError:
        raise BadOption("the page needs jinja2: pip install 'torchlms[report]'") from None
    course, plan, stats = course_of(record), record.plan, record.stats
    rows = _rows(record)
    plain_s = sum(op.time_s for op in record.tape.ops)
    here = (plan.budget.device_bytes, plain_s / plan.predicted.step_s if plan.predicted.step_s else 1.0)
    template = Environment(autoescape=True).from_string(_TEMPLATE.read_text())
    return template.render(
        title=plan.model or record.tape.model or "a run",
        subtitle=f"{record.tape.device}, torch {record.tape.torch}, {stats.get('steps', 0)} steps",
        cards=_cards(record),
        memory=Markup(
            memory_chart(
                course,
                budget_bytes=plan.budget.device_bytes,
                measured_bytes=int(stats.get("peak_device_bytes", 0)),
            )
        ),
        layers=LAYERS,
        tracks=Markup(tracks_chart(course)),
        speed=Markup(speed_chart(speeds(record, _SHARES), here)),
        drops=any(move.choice is Choice.RECOMPUTE for move in plan.moves),
        trouble=[Line(name, str(stats[name]), note) for name, note in _TROUBLE.items() if stats.get(name)],
        columns=_COLUMNS,
        values=rows[:_MOST_VALUES],
        left_out=max(0, len(rows) - _MOST_VALUES),
        machine=_machine(record.machine),
    )


def _cards(record: RunRecord) -> list[Line]:
    predicted, stats = record.plan.predicted, record.stats
    budget = format_bytes(record.plan.budget.device_bytes)
    smallest = format_bytes(record.plan.smallest_bytes)
    measured_peak = format_bytes(stats.get("peak_device_bytes", 0))
    waiting = f"{seconds_text(predicted.stall_s)} waiting"
    return [
        Line("device budget", budget, f"smallest that works: {smallest}"),
        Line("peak", format_bytes(predicted.peak_device_bytes), f"measured: {measured_peak}"),
        Line("step", seconds_text(predicted.step_s), f"measured: {_or_dash(stats.get('measured_step_s'))}"),
        Line("out and in per step", format_bytes(predicted.bytes_out), waiting),
        Line("host memory", format_bytes(predicted.arena_bytes), "pinned for what leaves"),
        Line("made again", _or_dash(stats.get("recompute_s_per_step")), "per step"),
    ]


def _or_dash(seconds: float | None) -> str:
    return seconds_text(seconds) if seconds else "-"


def _rows(record: RunRecord) -> list[Row]:
    chosen = {decision.value: decision for decision in record.plan.decisions}
    begins_s = [0.0]
    for op in record.tape.ops:
        begins_s.append(begins_s[-1] + op.time_s)
    movable = sorted(
        (value for value in record.tape.values if value.movable), key=lambda value: -value.size_bytes
    )
    return [_row(value, chosen.get(value.id), begins_s) for value in movable]


def _row(value: Value, decision: Decision | None, begins_s: list[float]) -> Row:
    last = len(begins_s) - 1
    idle_s = sum(
        max(0.0, begins_s[min(stretch.stop, last)] - begins_s[min(stretch.start, last)])
        for stretch in value.idle
    )
    return Row(
        size=format_bytes(value.size_bytes),
        size_bytes=value.size_bytes,
        choice=decision.choice.value if decision is not None else Choice.KEEP.value,
        module=value.module or "-",
        op=value.op or value.kind.value,
        idle=seconds_text(idle_s),
        idle_s=idle_s,
        reason=decision.reason if decision is not None and decision.reason else "there is room for it",
    )


def _machine(machine: Machine) -> list[Line]:
    lines = [Line("device", machine.device), Line("device memory", format_bytes(machine.device_bytes))]
    if machine.link:
        largest = machine.link[-1]
        size = largest.size_bytes
        lines += [
            Line(f"link out, copies of {format_bytes(size)}", _rate(size / largest.out_s)),
            Line(f"link in, copies of {format_bytes(size)}", _rate(size / largest.in_s)),
            Line("of which stays when both run", f"{machine.out_share:.0%} out, {machine.in_share:.0%} in"),
            Line("pinning", _rate(machine.pin_bytes_per_s)),
        ]
    lines += [
        Line("disk, writing", _rate(machine.disk_write_bytes_per_s)),
        Line("disk, reading", _rate(machine.disk_read_bytes_per_s)),
        Line("host memory available", format_bytes(machine.host_available_bytes)),
        Line("measured", machine.measured or "-"),
    ]
    return lines


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s else "not measured"
