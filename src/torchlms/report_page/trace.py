"""Trace: the planned step in the format that Perfetto and chrome://tracing read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchlms.report_page.course import LAYERS, course_of

if TYPE_CHECKING:
    from torchlms.report_page.record import RunRecord

_TRACKS = {"compute": 1, "waiting": 2, "out": 3, "in": 4}
_US = 1e6


def trace_events(record: RunRecord) -> dict[str, Any]:
    """Ops, waits and copies as slices, memory as counters. Times in microseconds, one step."""
    course = course_of(record)
    timeline, values = course.timeline, course.tape.values
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "predicted step"}}
    ]
    events += [
        {"ph": "M", "pid": 1, "tid": track, "name": "thread_name", "args": {"name": name}}
        for name, track in _TRACKS.items()
    ]
    for op, start_s, end_s in zip(course.tape.ops, timeline.start_s, timeline.end_s, strict=True):
        detail = {"module": op.module, "phase": op.phase.value, "workspace_bytes": op.scratch_bytes}
        events.append(_slice(op.name, "compute", float(start_s), float(end_s), detail))
    events += [_slice("waiting for a copy", "waiting", begin, end, {}) for begin, end in course.stalls_s]
    for copy in timeline.transfers:
        value = values[copy.value]
        detail = {"bytes": copy.size_bytes, "module": value.module, "to": copy.choice.value}
        events.append(_slice(value.op or value.kind.value, copy.direction, copy.start_s, copy.end_s, detail))
    for index, start_s in enumerate(timeline.start_s):
        used = {name: int(course.layers_bytes[name][index]) for name in LAYERS}
        events.append({"ph": "C", "pid": 1, "name": "memory", "ts": float(start_s) * _US, "args": used})
    measured_s = float(record.stats.get("measured_step_s", 0.0))
    if measured_s:
        events.append({"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "measured"}})
        whole = _slice("step", "compute", 0.0, measured_s, {"peak": record.stats.get("peak_device_bytes")})
        events.append({**whole, "pid": 2})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _slice(name: str, track: str, begin_s: float, end_s: float, detail: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": 1,
        "tid": _TRACKS[track],
        "name": name,
        "ts": begin_s * _US,
        "dur": max(0.0, end_s - begin_s) * _US,
        "args": detail,
    }
