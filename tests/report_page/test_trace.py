"""The trace: what Perfetto needs, and one time axis for plan and run."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from tests.report_page.runs import NAMES, run
from torchlms.report_page.step import step_of
from torchlms.report_page.trace import PLAN, RECORDED, STEPS, trace_json


def events(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(trace_json(run(name)))["traceEvents"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_event_is_one_that_viewers_read(name: str) -> None:
    for event in events(name):
        assert event["ph"] in "XCM"
        assert event["name"]
        assert {"pid", "tid"} <= event.keys()
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= 0


@pytest.mark.parametrize("name", NAMES)
def test_the_planned_step_ends_when_the_simulator_says(name: str) -> None:
    spans = [event for event in events(name) if event["ph"] == "X" and event["pid"] == PLAN]
    end_us = max(event["ts"] + event["dur"] for event in spans)
    assert end_us == pytest.approx(step_of(run(name)).timeline.step_s * 1e6, abs=0.01)


def test_spans_of_one_track_do_not_overlap() -> None:
    for name in ("host", "disk"):
        tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for event in events(name):
            if event["ph"] == "X":
                place = tracks.setdefault((event["pid"], event["tid"]), [])
                place.append((event["ts"], event["ts"] + event["dur"]))
        for spans in tracks.values():
            spans.sort()
            assert all(a[1] <= b[0] + 0.01 for a, b in pairwise(spans))


def test_memory_is_a_counter_that_adds_up() -> None:
    counters = [event for event in events("host") if event["ph"] == "C" and event["pid"] == PLAN]
    curve = step_of(run("host")).timeline.memory_bytes
    assert [sum(event["args"].values()) for event in counters] == list(curve)


def test_measured_steps_stand_beside_predicted_ones() -> None:
    steps = [event for event in events("host") if event["ph"] == "X" and event["pid"] == STEPS]
    assert [event["dur"] for event in steps[:3]] == [260_000, 250_000, 240_000]
    assert steps[0]["ts"] == steps[3]["ts"] == 0
    recorded = [event for event in events("host") if event["ph"] == "X" and event["pid"] == RECORDED]
    assert len(recorded) == len(run("host").tape.ops)
