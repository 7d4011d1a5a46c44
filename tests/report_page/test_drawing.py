"""What is drawn is what the simulator says."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from tapes import resnet, unet

from tests.report_page.runs import NAMES, choices, run
from torchlms.core.plan import Choice, Decision
from torchlms.core.units import seconds_text
from torchlms.report_page.axis import bytes_ticks, seconds_ticks
from torchlms.report_page.bands import away_bands, memory_bands
from torchlms.report_page.memory_chart import HEIGHT, memory_chart, pointed_at, shown_ops
from torchlms.report_page.run import Run
from torchlms.report_page.speed_chart import chosen_dots
from torchlms.report_page.step import step_of
from torchlms.report_page.tracks import compute_spans, fewer, tracks_of
from torchlms.report_page.value_rows import module_rows, value_rows


def test_the_runs_are_what_they_are_called() -> None:
    assert choices("host") == choices("ledger") ^ {Choice.DISK, Choice.HOST} == {Choice.HOST}
    assert Choice.DISK in choices("disk")
    assert Choice.RECOMPUTE in choices("recompute")
    assert choices("kept") == choices("planless") == set()


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_add_up_to_the_simulators_curve(name: str) -> None:
    step = step_of(run(name))
    bands = memory_bands(step)
    assert np.array_equal(sum(band.size_bytes for band in bands), step.timeline.memory_bytes)
    assert all((band.size_bytes >= 0).all() for band in bands)
    plan = run(name).plan
    if plan is not None:
        assert step.timeline.peak_device_bytes == plan.predicted.peak_device_bytes
        assert step.timeline.step_s == pytest.approx(plan.predicted.step_s)


@pytest.mark.parametrize("name", ["host", "disk", "ledger"])
def test_what_is_away_is_what_is_missing(name: str) -> None:
    step = step_of(run(name))
    away = sum(band.size_bytes for band in away_bands(step))
    assert np.array_equal(step.plain_bytes - away, step.timeline.memory_bytes)


@pytest.mark.parametrize("name", NAMES)
def test_the_compute_track_is_the_timeline(name: str) -> None:
    step = step_of(run(name))
    spans = compute_spans(step)
    waits = [span for span in spans if span.key == "wait"]
    assert len(spans) - len(waits) == len(step.tape.ops)
    assert sum(span.end_s - span.start_s for span in waits) == pytest.approx(step.timeline.stall_s, abs=1e-7)
    assert spans[-1].end_s == pytest.approx(step.timeline.step_s)


@pytest.mark.parametrize("name", ["host", "disk", "ledger"])
def test_the_copy_tracks_hold_every_copy(name: str) -> None:
    step = step_of(run(name))
    _, out, back = tracks_of(step, has_link=bool(run(name).machine.link))
    for track, direction in ((out, "out"), (back, "in")):
        copies = [one for one in step.timeline.transfers if one.direction == direction]
        assert sorted(span.start_s for span in track.spans) == pytest.approx(
            sorted(c.start_s for c in copies)
        )
        for lane in track.lanes:
            assert all(a.end_s <= b.start_s + 1e-8 for a, b in pairwise(lane))


def test_numbers_in_the_drawing_are_bytes_of_the_curve() -> None:
    one = run("host")
    step = step_of(one)
    chart = memory_chart(one, step, memory_bands(step))
    paths = re.findall(r'class="fill [a-z]+" d="([^"]+)"', chart.svg)
    highest = min(float(y) for y in re.findall(r"(?:M[\d.]+ |V)([\d.]+)", paths[0]))
    plan = one.plan
    assert plan is not None
    (budget_y,) = re.findall(r'class="line budget" d="M0 ([\d.]+)L', chart.svg)
    scale = plan.budget.device_bytes / (HEIGHT - float(budget_y))
    assert (HEIGHT - highest) * scale == pytest.approx(step.timeline.peak_device_bytes, rel=1e-3)


def test_peaks_survive_where_a_step_has_more_ops_than_can_be_drawn() -> None:
    curve = np.arange(5000)
    curve[2500] = 10**6
    ops = shown_ops(curve, 100)
    assert len(ops) == 100
    assert 2500 in ops
    assert list(ops) == sorted(ops)


def test_many_spans_become_few_and_cover_the_same() -> None:
    step = step_of(Run(resnet(60), run("host").machine))
    spans = compute_spans(step)
    drawn = fewer(spans, 50)
    assert len(drawn) <= 50
    assert sum(span.merged for span in drawn) == len(spans)
    assert (drawn[0].start_s, drawn[-1].end_s) == (spans[0].start_s, spans[-1].end_s)


@pytest.mark.parametrize("name", NAMES)
def test_every_decision_is_a_row_with_its_reason(name: str) -> None:
    one = run(name)
    rows = value_rows(step_of(one))
    plan = one.plan
    expected = sorted(
        (one.tape.values[move.value].size_bytes, move.choice.value, move.reason)
        for move in (plan.moves if plan is not None else ())
    )
    assert sorted((r.size_bytes, r.choice, r.reason) for r in rows if r.choice != "keep") == expected
    assert all(row.reason for row in rows)
    for row in rows:  # the planner's words for the same time
        if row.reason.startswith("idle"):
            assert f"idle {seconds_text(row.idle_s)}" in row.reason
    total = sum(sum(module.size_bytes.values()) for module in module_rows(rows))
    assert total == sum({row.value: row.size_bytes for row in rows}.values())


def test_what_a_rule_keeps_is_named_with_the_rule() -> None:
    one = replace(run("host"), plan=None, options={"rules": {"keep_ops": ["aten.*"]}})
    reasons = {row.reason for row in value_rows(step_of(one)) if row.op.startswith("aten.") and row.idle_s}
    assert reasons == {"kept by the rule keep_ops 'aten.*'"}


def test_what_stays_is_told_with_what_leaving_would_take() -> None:
    """As in ``report()``, and each value by its own figures."""
    one = run("host")
    assert one.plan is not None
    gone = {move.value for move in one.plan.moves}
    stays = [row for row in value_rows(step_of(one)) if row.idle_s and row.value not in gone]
    reasons = [row.reason for row in stays if row.reason.startswith("it fits, and going would cost more")]
    assert len(set(reasons)) > 1
    assert all("idle" in reason and "copies" in reason for reason in reasons)


def test_the_chosen_point() -> None:
    one = run("host")
    assert one.plan is not None
    step = step_of(one)
    (budget_bytes, speed, key, _), (_, measured, _, name) = chosen_dots(one, step)
    assert (budget_bytes, key) == (one.plan.budget.device_bytes, "chosen")
    assert speed == pytest.approx(step.plain_s / one.plan.predicted.step_s)
    assert measured == pytest.approx(step.plain_s / 0.25)
    assert "step 250 ms" in name


def test_what_is_pointed_at() -> None:
    step = step_of(run("host"))
    said = pointed_at(step, memory_bands(step))
    at = len(said["op"]) // 2
    assert sum(band["bytes"][at] for band in said["bands"]) == step.timeline.memory_bytes[at]


def test_a_step_without_ops() -> None:
    empty = replace(resnet(1), ops=(), values=())
    step = step_of(Run(empty, run("host").machine))
    assert tracks_of(step, has_link=True)[0].spans == ()
    assert memory_bands(step) == ()


def test_ticks_are_round() -> None:
    assert [tick.label for tick in bytes_ticks(16 << 30)] == ["0 GiB", "5 GiB", "10 GiB", "15 GiB"]
    assert [tick.label for tick in seconds_ticks(0.2, wanted=4)] == [
        "0 ms",
        "50 ms",
        "100 ms",
        "150 ms",
        "200 ms",
    ]
    assert next(tick.label for tick in bytes_ticks(120 << 20, least=88 << 20)) == "90 MiB"


def test_a_value_that_leaves_twice_by_different_choices() -> None:
    one = run("host")
    tape = unet()
    twice = next(value for value in tape.values if len(value.idle) == 2)
    moves = tuple(
        Decision(twice.id, number, choice, stretch.start + 1, stretch.stop, 0, f"stretch {number}")
        for number, (stretch, choice) in enumerate(zip(twice.idle, (Choice.HOST, Choice.DISK), strict=True))
    )
    assert one.plan is not None
    step = step_of(replace(one, tape=tape, plan=replace(one.plan, decisions=moves)))
    bands = memory_bands(step)
    assert np.array_equal(sum(band.size_bytes for band in bands), step.timeline.memory_bytes)
    assert all((band.size_bytes >= 0).all() for band in bands)
    assert [band.key for band in away_bands(step)] == ["host", "disk"]
    rows = [row for row in value_rows(step) if row.value == twice.id]
    assert [(row.choice, row.reason) for row in rows] == [("host", "stretch 0"), ("disk", "stretch 1")]
