"""What was measured of a step's memory, beside what was foretold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchlms
from tests.report_page.profiles import event
from tests.report_page.runs import run
from torchlms.report_page.measured import measured_bytes
from torchlms.report_page.page import page
from torchlms.report_page.profiled import Profiled
from torchlms.report_page.run import Run
from torchlms.report_page.saving import run_of
from torchlms.report_page.step import step_of
from torchlms.steps import ProfileWindow

STEPS = 8


@pytest.fixture(scope="module")
def profiled_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Profiled]:
    """A small network within a budget that has values leave, its last step profiled."""
    folder = tmp_path_factory.mktemp("profiled")
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.GELU())])
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    path = folder / "profile.json"
    with (
        torchlms.LMS(net, optimizer, budget="1500KiB", disk_dir=folder, rules={"min_bytes": 1024}) as lms,
        ProfileWindow(path, first=STEPS - 1, last=STEPS - 1) as window,
    ):
        for _ in range(STEPS):
            net(torch.randn(512, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            window.step()
        found = run_of(lms)
    return found, Profiled.load(path)


def test_it_is_what_was_foretold(profiled_run: tuple[Run, Profiled]) -> None:
    """In the middle of all ops to a hundredth of the peak; at some of them LMS itself has a copy in hand."""
    found, profiled = profiled_run
    assert found.plan is not None
    assert found.plan.moves
    predicted = step_of(found).timeline.memory_bytes
    measured = measured_bytes(found.tape, profiled, int(predicted[0]))
    assert len(measured) > 0.6 * len(found.tape.ops)
    off = np.array([abs(size_bytes - int(predicted[op])) for op, size_bytes in measured.items()])
    assert np.median(off) <= 0.01 * predicted.max()


def test_it_is_drawn(profiled_run: tuple[Run, Profiled]) -> None:
    pytest.importorskip("jinja2")
    found, profiled = profiled_run
    text = page(found, profiled=profiled)
    assert f"measured in step {STEPS - 1}, at the same ops" in text
    assert 'class="line seen"' in text
    assert "only the peaks are known" not in text
    assert "only the peaks are known" in page(found)


def test_a_profile_of_something_else_is_not_drawn(profiled_run: tuple[Run, Profiled]) -> None:
    found, profiled = profiled_run
    assert measured_bytes(run("host").tape, profiled, 0) == {}
    assert measured_bytes(found.tape, replace(profiled, allocated=()), 0) == {}
    pytest.importorskip("jinja2")
    assert "only the peaks are known" in page(run("host"), profiled=profiled)


def test_bytes_of_a_device_count_from_nothing(tmp_path: Path) -> None:
    notes = [
        {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": ts, "args": arguments}
        for ts, arguments in (
            (5.0, {"Device Type": 0, "Total Allocated": 1}),
            (20.0, {"Device Type": 1, "Total Allocated": 700}),
            (40.0, {"Device Type": 1, "Total Allocated": 900}),
            (500.0, {"Device Type": 1, "Total Allocated": 100}),
        )
    ]
    calls = [event("cpu_op", "aten::mm", 10.0, 20.0), event("cpu_op", "aten::relu", 35.0, 10.0)]
    path = tmp_path / "trace.json"
    path.write_text(
        json.dumps({"traceEvents": [event("user_annotation", "step 3", 0.0, 100.0), *calls, *notes]})
    )
    profiled = Profiled.load(path)
    assert profiled.absolute
    assert [size_bytes for _, size_bytes in profiled.allocated] == [700, 900]
    ops = run("host").tape.ops
    tape = replace(
        run("host").tape,
        ops=(replace(ops[0], name="aten.mm.default"), replace(ops[1], name="aten.relu.default")),
    )
    assert measured_bytes(tape, profiled, 12345) == {0: 700, 1: 900}
