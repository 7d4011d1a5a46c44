"""Trace: plan and run on one time axis, in the format that Perfetto and chrome://tracing read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torchlms.report_page.bands import memory_bands
from torchlms.report_page.step import step_of
from torchlms.report_page.tracks import tracks_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchlms.report_page.profiled import Profiled
    from torchlms.report_page.run import Run
    from torchlms.report_page.step import Step
    from torchlms.report_page.tracks import Span, Track

PLAN, PROFILED, RECORDED, STEPS = 1, 2, 3, 4  # processes, as the viewers call what has tracks of its own

_Event = dict[str, Any]


def trace_json(run: Run, profiled: Profiled | None = None) -> str:
    """The planned step, a step as the profiler saw it if there is one, the recorded ops at their measured
    times, and the steps that were measured: each begins at 0."""
    step = step_of(run)
    tracks = tracks_of(step, has_link=bool(run.machine.link))
    events = [
        *_plan_events(step, tracks),
        *(_profiled_events(profiled) if profiled is not None else ()),
        *_recorded_events(step),
        *_step_events(run, step),
    ]
    data = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"schema": run.schema, "model": run.tape.model, "device": run.tape.device},
    }
    return json.dumps(data, separators=(",", ":")) + "\n"


def _plan_events(step: Step, tracks: Sequence[Track]) -> list[_Event]:
    events = [_process(PLAN, "plan, predicted")]
    thread = 0
    for track in tracks:
        for number, lane in enumerate(track.lanes):
            thread += 1
            events.append(_thread(PLAN, thread, track.name if not number else f"{track.name} ({number + 1})"))
            events += [_span(PLAN, thread, span) for span in lane]
    bands = memory_bands(step)
    for index, start_s in enumerate(step.timeline.start_s):
        counts = {band.name: int(band.size_bytes[index]) for band in bands}
        events.append(_event("C", PLAN, 0, float(start_s), name="device bytes", args=counts))
    return events


def _profiled_events(profiled: Profiled) -> list[_Event]:
    events = [_process(PROFILED, f"{profiled.name}, as the profiler saw it")]
    for thread, (name, lane) in enumerate(profiled.tracks.items(), 1):
        events.append(_thread(PROFILED, thread, name))
        for one in lane:
            args = {"bytes": one.size_bytes} if one.size_bytes else None
            events.append(
                _event("X", PROFILED, thread, one.start_s, seconds=one.seconds, name=one.name, args=args)
            )
    return events


def _recorded_events(step: Step) -> list[_Event]:
    """Op after op as they were timed, without what they wait for."""
    events = [_process(RECORDED, "ops as measured, nothing moved"), _thread(RECORDED, 1, "computing")]
    clock_s = 0.0
    for index, op in enumerate(step.recorded.ops):
        args = {"op": index, "module": op.module, "phase": op.phase.value}
        events.append(_event("X", RECORDED, 1, clock_s, seconds=op.time_s, name=op.name, args=args))
        count = {"bytes": int(step.plain_bytes[index])}
        events.append(_event("C", RECORDED, 0, clock_s, name="device bytes, nothing moved", args=count))
        clock_s += op.time_s
    return events


def _step_events(run: Run, step: Step) -> list[_Event]:
    """Whole steps, one after the other, as measured and as predicted."""
    if not run.steps_s:
        return []
    predicted_s = run.plan.predicted.step_s if run.plan is not None else step.timeline.step_s
    events = [_process(STEPS, "steps, measured and predicted")]
    rows: Iterable[tuple[int, str, Sequence[float]]] = (
        (1, "measured", run.steps_s),
        (2, "predicted", [predicted_s] * len(run.steps_s)),
    )
    for thread, name, seconds in rows:
        events.append(_thread(STEPS, thread, name))
        clock_s = 0.0
        for number, step_s in enumerate(seconds, 1):
            events.append(_event("X", STEPS, thread, clock_s, seconds=step_s, name=f"step {number}"))
            clock_s += step_s
    return events


def _span(process: int, thread: int, span: Span) -> _Event:
    args = {"what": span.key, "detail": span.detail}
    return _event(
        "X", process, thread, span.start_s, seconds=span.end_s - span.start_s, name=span.name, args=args
    )


def _event(
    phase: str,
    process: int,
    thread: int,
    start_s: float,
    *,
    name: str,
    seconds: float | None = None,
    args: dict[str, Any] | None = None,
) -> _Event:
    event: _Event = {"ph": phase, "pid": process, "tid": thread, "ts": round(start_s * 1e6, 3), "name": name}
    if seconds is not None:
        event["dur"] = round(seconds * 1e6, 3)
    if args:
        event["args"] = args
    return event


def _process(process: int, name: str) -> _Event:
    return {"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": name}}


def _thread(process: int, thread: int, name: str) -> _Event:
    return {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": name}}
