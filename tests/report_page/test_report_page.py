"""The page says what the record says, needs nothing else, and is looked at in a browser if there is one."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tapes import GIB, gpu, resnet
from typer.testing import CliRunner

import torchlms
from torchlms.cli import app
from torchlms.core import joint
from torchlms.core.plan import Budget, Choice
from torchlms.core.planner import plan
from torchlms.core.rules import Rules
from torchlms.core.simulate import baseline_curve, smallest_budget
from torchlms.report_page import RunRecord, save_run
from torchlms.report_page.course import course_of, speeds
from torchlms.report_page.page import page
from torchlms.report_page.trace import trace_events

pytest.importorskip("jinja2", reason="the page is filled in by jinja2, of the extra 'report'")

STATS = {"steps": 9, "peak_device_bytes": 5 * GIB, "measured_step_s": 0.5, "reclaims": 3, "retries": 0}


@pytest.fixture(params=["moved", "dropped"])
def record(request: pytest.FixtureRequest) -> RunRecord:
    from test_drops import LOTS, blocks

    if request.param == "dropped":
        tape, machine = blocks(10), gpu(link=4e9)
        budget = Budget(int(0.4 * baseline_curve(tape).max()), LOTS, 0)
        return RunRecord(tape, machine, joint.plan(tape, machine, budget, Rules(recompute=True)), STATS)
    tape, machine = resnet(8), gpu()
    least, most = smallest_budget(tape), int(baseline_curve(tape).max())
    budget = Budget((least + most) // 2, LOTS, 0)
    return RunRecord(tape, machine, plan(tape, machine, budget, Rules(min_bytes=0)), STATS)


def test_what_is_saved_is_read_again(record: RunRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path / "run.json") == record


def test_a_run_that_was_trained(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    with torchlms.LMS(model, budget="1GiB", disk_dir=tmp_path) as lms:
        with pytest.raises(torchlms.NotSupported, match="from the second step on"):
            save_run(lms, tmp_path / "run.json")
        for _ in range(4):
            torch.nn.functional.gelu(model(torch.ones(64, 8))).sum().backward()
        save_run(lms, tmp_path / "run.json")
    found = RunRecord.load(tmp_path / "run.json")
    assert found.stats["steps"] >= 3
    assert "<svg" in page(found)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "torchlms.tape/1"}'])
def test_what_is_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(torchlms.PlanMismatch, match=r"run\.json"):
        RunRecord.load(tmp_path / "run.json")


def test_layers_add_up_to_the_curve(record: RunRecord) -> None:
    course = course_of(record)
    assert np.array_equal(course.memory_bytes, course.timeline.memory_bytes)
    assert course.memory_bytes.max() == record.plan.predicted.peak_device_bytes
    assert all((layer >= 0).all() for layer in course.layers_bytes.values())
    dropped = any(move.choice is Choice.RECOMPUTE for move in record.plan.moves)
    assert course.layers_bytes["made again"].any() == dropped
    waited_s = sum(end - begin for begin, end in course.stalls_s)
    assert waited_s == pytest.approx(record.plan.predicted.stall_s, rel=0.01, abs=1e-5)


def test_the_page(record: RunRecord) -> None:
    text = page(record)
    assert len(text) < 2_000_000
    assert not re.search(r'(src|href)="http|@import|url\(', text), "it needs nothing from elsewhere"
    checker = Balanced()
    checker.feed(text)
    assert checker.open == []
    assert text.count('<td class="number" data-by=') == 2 * sum(value.movable for value in record.tape.values)
    assert "times that room had to be made at once" in text
    assert "run again" not in text, "nothing was retried"
    copies = sum(move.choice in (Choice.HOST, Choice.DISK) for move in record.plan.moves)
    assert text.count('<rect class="out" x=') == copies


class Balanced(html.parser.HTMLParser):
    """Which tags are open at the end."""

    VOID = ("meta", "input", "line", "rect", "circle", "polyline", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_what_a_name_may_contain(record: RunRecord) -> None:
    nasty = RunRecord(
        record.tape, record.machine, record.plan, {**STATS, "steps": "<script>alert(1)</script>"}
    )
    assert "<script>alert" not in page(nasty)


def test_speeds_grow_with_the_budget(record: RunRecord) -> None:
    found = speeds(record, (0.2, 0.6, 1.0))
    assert [size for size, _ in found] == sorted(size for size, _ in found)
    assert found[-1][1] == pytest.approx(1.0)
    assert found[0][1] <= found[1][1] <= 1.0


def test_the_trace(record: RunRecord) -> None:
    events = json.loads(json.dumps(trace_events(record)))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    computing = [event for event in slices if event["tid"] == 1]
    course = course_of(record)
    assert len(computing) == len(record.tape.ops)
    assert max(event["ts"] + event["dur"] for event in computing) == pytest.approx(
        course.timeline.step_s * 1e6
    )
    assert sum(event["tid"] in (3, 4) for event in slices) == len(course.timeline.transfers)
    peak = max(sum(event["args"].values()) for event in events if event["ph"] == "C")
    assert peak == record.plan.predicted.peak_device_bytes
    assert [event["dur"] for event in events if event["ph"] == "X" and event["pid"] == 2] == [0.5e6]


def test_the_command(record: RunRecord, tmp_path: Path) -> None:
    run, output, trace = (tmp_path / name for name in ("run.json", "page.html", "trace.json"))
    record.save(run)
    found = CliRunner().invoke(app, ["report", str(run), "-o", str(output), "--trace", str(trace)])
    assert found.exit_code == 0, found.output
    assert output.read_text().startswith("<!doctype html>")
    assert json.loads(trace.read_text())["traceEvents"]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to look at the page with")
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser(width: int, record: RunRecord, tmp_path: Path) -> None:
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    # What the page's own script does is tried by another one at its end.
    trial = """<script>
    document.querySelector("#values th button").click();
    const first = document.querySelector("#values tbody tr td").dataset.by;
    document.querySelector("#filter").value = "nothing has this name";
    document.querySelector("#filter").dispatchEvent(new Event("input"));
    const shown = [...document.querySelectorAll("#values tbody tr")].filter(row => !row.hidden).length;
    document.title = JSON.stringify({ first, shown, wide: document.documentElement.scrollWidth });
    </script>"""
    path.write_text(page(record).replace("</html>", trial + "</html>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command = [str(BROWSER), *options, f"--window-size={width},1200"]
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert int(seen["first"]) == min(value.size_bytes for value in record.tape.values if value.movable)
    assert seen["shown"] == 0
    assert seen["wide"] <= max(width, 500), (
        "no scrolling sideways; headless windows are 500 wide at the least"
    )
    subprocess.run([*command, f"--screenshot={picture}", path.as_uri()], capture_output=True, timeout=60)
    assert picture.stat().st_size > 10_000
