"""What LMS says of itself: state, statistics, report and log, predicted beside measured."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sessions import (
    Loop,
    more,
    new_session,
    open_lms,
    plain_peak,
    plain_step,
    run_lms,
)
from small_networks import NETWORKS
from test_loops import ANYWHERE, evaluate_between

import torchlms
from torchlms.core.curve import before_bytes
from torchlms.core.plan import Choice, Plan
from torchlms.core.tape import Kind, Phase, Tape

MLP = NETWORKS["mlp"]
BUDGET = 800_000  # of 1.7 MB

# Those of the benchmark's result files, and what is added for the reader.
KEYS = {
    "peak_device_bytes",
    "peak_reserved_bytes",
    "peak_host_bytes",
    "bytes_out_per_step",
    "bytes_in_per_step",
    "disk_bytes_per_step",
    "recompute_s_per_step",
    "reclaims",
    "plan",
    "predicted",
    "plan_s",
    "budget_bytes",
    "steps",
    "state",
}


@pytest.mark.parametrize("loop", [plain_step, *(loop for loop in ANYWHERE if loop is not evaluate_between)])
@pytest.mark.parametrize("name", [more("mlp"), "transformer"])
def test_the_peak_comes_true(name: str, loop: Loop, spill_dir: Path) -> None:
    network = NETWORKS[name]
    budget = int(0.7 * plain_peak(network, loop))
    stats = run_lms(network, budget, spill_dir, loop, steps=7).stats
    predicted, measured = stats["predicted"]["peak_device_bytes"], stats["peak_device_bytes"]
    assert measured <= budget
    assert abs(predicted - measured) <= 0.05 * measured


def test_states_follow_each_other(spill_dir: Path) -> None:
    session = new_session(MLP)
    states = []
    lms = open_lms(session, BUDGET, spill_dir)
    with lms as opened:
        for step in range(6):
            states.append(opened.state)
            plain_step(session, step)
            opened.stats()
            opened.report()
        states.append(opened.state)
    assert states == ["record", "record", *["guard"] * 5]
    assert opened.state == "off"
    assert opened.stats()["steps"] == 6, "the figures stay"


def test_statistics(spill_dir: Path) -> None:
    watched = run_lms(MLP, BUDGET, spill_dir, steps=8)
    stats = watched.stats
    assert set(stats) >= KEYS
    json.dumps(stats)
    assert stats["budget_bytes"] == BUDGET
    assert stats["steps"] == 8
    assert stats["record_steps"] == 1
    assert stats["state"] == "guard"
    assert stats["bytes_out_per_step"] == stats["bytes_in_per_step"] == stats["disk_bytes_per_step"] > 0
    assert stats["peak_host_bytes"] == stats["pinned_bytes"] == 0, "the CPU's slow tier is the file"
    assert stats["measured_step_s"] > 0
    assert stats["late_fetches"] == stats["strayed"] == stats["replans"] == stats["retries"] == 0
    chosen = stats["plan"]
    assert set(chosen) == {choice.value for choice in Choice}
    movable = [value for value in watched.tape.values if value.movable]
    assert sum(entry["values"] for entry in chosen.values()) == len(movable)
    assert sum(entry["bytes"] for entry in chosen.values()) == sum(value.size_bytes for value in movable)
    assert chosen["disk"]["bytes"] == stats["bytes_out_per_step"] == watched.plan.predicted.bytes_out
    assert set(stats["predicted"]) >= {"peak_device_bytes", "step_s"}


def test_bytes_are_those_of_planned_steps_only(spill_dir: Path) -> None:
    """The recorded step moves more, or less; it is left out."""
    few, many = (run_lms(MLP, BUDGET, spill_dir, steps=steps).stats for steps in (5, 12))
    assert few["bytes_out_per_step"] == many["bytes_out_per_step"]


def test_the_report(spill_dir: Path) -> None:
    watched = run_lms(MLP, BUDGET, spill_dir)
    lines = watched.report.splitlines()
    assert lines[0].startswith(
        "LMS is on, following a plan; 6 steps of forward and backward, 1 of them recorded; budget 781.2 KiB"
    )
    assert lines[1].split() == ["predicted", "measured"]
    peak = next(line for line in lines if line.startswith("peak allocated"))
    predicted, measured = watched.stats["predicted"], watched.stats["peak_device_bytes"]
    assert f"{predicted['peak_device_bytes'] / 1024:.1f} KiB" in peak
    assert f"{measured / 1024:.1f} KiB" in peak
    assert any(line.startswith("step ") and line.count(" ms") == 2 for line in lines)
    assert any("per step" in line and line.startswith("out ") for line in lines)
    assert any("disk" in line and "layers." in line and "idle" in line for line in lines), "no reasons"


def test_the_report_before_and_after(spill_dir: Path) -> None:
    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir) as lms:
        assert lms.report().startswith("LMS is recording: the plan is not made yet; 0 steps")
        assert lms.tape is None
        assert lms.plan is None
        for step in range(5):
            plain_step(session, step)
        inside = lms.report()
    before, after = (
        [line for line in text.splitlines() if not line.startswith("step ")]  # the last step has just ended
        for text in (inside, lms.report().replace("has ended", "is on, following a plan"))
    )
    racing = "this plan is one of several that are timed against each other; the fastest will stay"
    ended = "it ended while several plans were timed against each other; this was one of them"
    assert after == [ended if line == racing else line for line in before]


def test_the_log_in_one_line_each(spill_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_lms(MLP, BUDGET, spill_dir)
    lines = [record.getMessage() for record in caplog.records if record.name == "torchlms"]
    assert len(lines) == 4
    assert lines[0].startswith("recording step 1 on cpu, budget 781.2 KiB")
    assert "first plan" in lines[1]
    assert "planning a step of" in lines[2]
    for part in (
        "values move",
        "out and",
        "in per step",
        "predicted peak",
        "of 781.2 KiB",
        "largest single op",
    ):
        assert part in lines[3]
    assert all(record.levelno == logging.INFO for record in caplog.records if record.name == "torchlms")


def test_a_network_that_fits_moves_nothing_and_says_so(
    spill_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = run_lms(MLP, 2 * plain_peak(MLP), spill_dir)
    assert watched.moved_bytes == 0
    assert watched.stats["plan"]["disk"]["values"] == 0
    assert any("0 values move" in record.getMessage() for record in caplog.records)
    assert list(spill_dir.iterdir()) == []


def test_the_tape_is_of_the_whole_step(spill_dir: Path) -> None:
    tape = run_lms(MLP, 2 * plain_peak(MLP), spill_dir).tape
    assert isinstance(tape, Tape)
    phases = [op.phase for op in tape.ops]
    assert phases == sorted(phases, key=[Phase.FORWARD, Phase.BACKWARD, Phase.BETWEEN].index)
    assert set(phases) == set(Phase)
    kinds = {kind: [value for value in tape.values if value.kind is kind] for kind in Kind}
    model = new_session(MLP).model
    assert len(kinds[Kind.PARAMETER]) == len(list(model.parameters()))
    assert {value.size_bytes for value in kinds[Kind.PARAMETER]} == {
        parameter.untyped_storage().nbytes() for parameter in model.parameters()
    }
    assert len(kinds[Kind.STATE]) == 3 * len(kinds[Kind.PARAMETER])
    saved = [value for value in tape.values if value.movable]
    assert len([value for value in saved if value.module.startswith("layers.")]) >= 20
    assert len([value for value in saved if not value.module]) <= 2, "the loss is in no module"
    assert all(value.idle[0].start < value.idle[0].stop for value in saved)
    assert tape.torch
    assert tape.device == "cpu"


def test_tape_and_plan_go_to_files_and_back(spill_dir: Path, tmp_path: Path) -> None:
    watched = run_lms(MLP, BUDGET, spill_dir)
    watched.tape.save(tmp_path / "tape.json")
    watched.plan.save(tmp_path / "plan.json")
    assert Tape.load(tmp_path / "tape.json") == watched.tape
    assert Plan.load(tmp_path / "plan.json") == watched.plan
    assert watched.tape.fingerprint == watched.plan.fingerprint


def test_the_fingerprint_names_the_computation(spill_dir: Path) -> None:
    """The same for the same network and batch under any budget; another for another."""
    prints = [
        run_lms(network, budget, spill_dir, steps=4).tape.fingerprint
        for network, budget in [
            (MLP, 4_000_000),
            (MLP, BUDGET),
            (replace(MLP, batch_size=500), 4_000_000),
            (NETWORKS["lstm"], 4_000_000),
        ]
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_what_a_step_begins_with_later_is_foretold(spill_dir: Path) -> None:
    """An optimizer that steps after two passes makes its states when the first pass has been recorded."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(64, 64)
    with torchlms.LMS(model, optimizer, budget="64MiB", disk_dir=spill_dir) as lms:
        for step in range(12):
            model(x).square().mean().backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        stats = lms.stats()
        assert lms.tape is not None
        states = sum(2 * parameter.nbytes for parameter in model.parameters())
        assert before_bytes(lms.tape) >= states
        assert stats["replans"] == 0
    predicted_bytes = stats["predicted"]["peak_device_bytes"]
    assert stats["peak_device_bytes"] <= predicted_bytes <= 1.01 * stats["peak_device_bytes"]
