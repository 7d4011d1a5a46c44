"""A step as the profiler saw it, beside the plan."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.report_page.profiles import BEHIND
from tests.report_page.runs import run
from torchlms.errors import BadOption
from torchlms.report_page.profiled import Happened, Profiled
from torchlms.report_page.trace import PROFILED, trace_json
from torchlms.steps import ProfileWindow


def test_what_a_step_began_on_the_device_belongs_to_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": BEHIND}))
    profiled = Profiled.load(path)
    assert profiled.name == "step 11"
    assert {name: [one.name for one in lane] for name, lane in profiled.tracks.items()} == {
        "computing, stream 7": ["gemm", "relu"],
        "copies out, stream 13": ["Memcpy DtoH (Device -> Pinned)"],
    }
    assert profiled.tracks["copies out, stream 13"] == (
        Happened("Memcpy DtoH (Device -> Pinned)", pytest.approx(60e-6), pytest.approx(40e-6), 4096),
    )


def test_a_step_of_a_cpu_beside_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    model = torch.nn.Linear(8, 8)
    with ProfileWindow(path, first=1, last=2) as window:
        for _ in range(4):
            model(torch.ones(8, 8)).sum().backward()
            window.step()
    compressed = tmp_path / "trace.json.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert Profiled.load(compressed) == Profiled.load(path)

    profiled = Profiled.load(path)
    assert profiled.name == "step 2"
    assert all(name.startswith("computing, thread ") for name in profiled.tracks)
    ops = [one for lane in profiled.tracks.values() for one in lane]
    assert sum(one.name == "aten::addmm" for one in ops) == 1  # of one step, not of two
    assert min(one.start_s for one in ops) == 0

    events = json.loads(trace_json(run("host"), profiled))["traceEvents"]
    drawn = [event for event in events if event["pid"] == PROFILED]
    assert sum(event["ph"] == "X" for event in drawn) == len(ops)
    assert "step 2, as the profiler saw it" in [event.get("args", {}).get("name") for event in drawn]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ("[]", "marks no step"),
        ("3", "marks no step"),
        (json.dumps({"traceEvents": BEHIND[3:]}), "marks no step"),
        (json.dumps({"traceEvents": BEHIND[:3]}), "nothing ran in step 11"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_such_profile_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "trace.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadOption, match=says):
        Profiled.load(path)
