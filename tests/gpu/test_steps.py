"""A row for each step and a trace of some, on a device, and they change no bits."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import torchlms
from tests.gpu.networks import CASES, make, train
from torchlms.report_page.profiled import Profiled
from torchlms.steps import ProfileWindow, StepLog

pytestmark = pytest.mark.gpu
CASE = CASES["convnet"]
STEPS = 8


def test_rows_and_a_trace(tmp_path: Path) -> None:
    model, optimizer = make(CASE)
    losses = [train(model, optimizer, CASE, 1) for _ in range(STEPS)]
    model, optimizer = make(CASE)
    trace = tmp_path / "trace.json"
    with (
        torchlms.LMS(model, optimizer, budget=CASE.budget_bytes, recompute=False) as lms,
        StepLog(lms, tmp_path / "steps.csv", skip=5) as log,
        ProfileWindow(trace, first=5, last=6) as window,
    ):
        for number in range(STEPS):
            assert train(model, optimizer, CASE, 1) == losses[number]
            log.step()
            window.step()
    rows = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert all(int(row["active_device_bytes"]) > 0 for row in rows)
    assert int(rows[-1]["host_bytes"]) > 0
    assert log.averages()["steps"] == STEPS - 5
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert any("convolution" in name for name in names)
    assert {"step 5", "step 6"} <= names
    profiled = Profiled.load(trace)
    assert profiled.name == "step 6"
    kinds = {name.split(",")[0]: lane for name, lane in profiled.tracks.items()}
    assert kinds.keys() == {"computing", "copies out", "copies in"}
    moved = [one for kind in ("copies out", "copies in") for one in kinds[kind] if one.size_bytes]
    plan = lms.plan
    assert plan is not None
    assert sum(one.size_bytes for one in moved) >= plan.predicted.bytes_out
