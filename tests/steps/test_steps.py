"""A row per step, averages without the first ones, and a trace of some steps."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import torchlms
from torchlms.steps import ProfileWindow, StepLog

STEPS = 7


class Scalars(list[tuple[str, float, int]]):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.append((tag, scalar_value, global_step))


@pytest.fixture
def lms(tmp_path: Path) -> torchlms.LMS:
    model = torch.nn.Linear(4, 4)
    return torchlms.LMS(model, budget="1GiB", disk_dir=tmp_path)


def test_a_row_per_step(lms: torchlms.LMS, tmp_path: Path) -> None:
    scalars = Scalars()
    path = tmp_path / "steps.csv"
    with lms, StepLog(lms, path, writer=scalars, skip=2) as log:
        assert log.averages() == {}
        for step in range(STEPS):
            torch.nn.functional.relu(torch.ones(2, requires_grad=True) * 2).sum().backward()
            time.sleep(0.01 * (step < 2))
            row = log.step()
            assert row.step == step
            assert len(list(csv.DictReader(path.open()))) == step + 1, "written at once"
    rows = list(csv.DictReader(path.open()))
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert all(float(row["seconds"]) > 0 for row in rows)
    averages = log.averages()
    assert averages["steps"] == STEPS - 2
    seconds = [float(row["seconds"]) for row in rows]
    assert min(seconds[:2]) > 0.01
    assert averages["seconds"] == pytest.approx(sum(seconds[2:]) / (STEPS - 2), rel=0.01), (
        "not the skipped ones"
    )
    assert averages["reclaims"] == 0
    assert ("torchlms/seconds", float(rows[3]["seconds"]), 3) in scalars
    assert len(scalars) == STEPS * (len(rows[0]) - 1)


def test_reclaims_are_those_since_the_row_before(lms: torchlms.LMS) -> None:
    with lms, StepLog(lms, skip=0) as log:
        assert lms._engine is not None
        for reclaims in (2, 0, 3):
            lms._engine.ladder.reclaims += reclaims
            assert log.step().reclaims == reclaims
    assert log.averages()["reclaims"] == pytest.approx(5 / 3)


def test_tags_and_a_rate(lms: torchlms.LMS, tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    with lms, StepLog(lms, path, skip=0, batch_size=32) as log:
        for phase in ("train", "train", "validate"):
            time.sleep(0.002)
            row = log.step(phase=phase, epoch=0)
            assert row.items_per_s == pytest.approx(32 / row.seconds)
        with pytest.raises(ValueError, match=r"the first step had \['epoch', 'phase'\]"):
            log.step(phase="train")
    rows = list(csv.DictReader(path.open()))
    assert [row["phase"] for row in rows] == ["train", "train", "validate"]
    assert float(rows[1]["items_per_s"]) == log.rows[1].items_per_s
    assert log.averages()["items_per_s"] > 0


def test_tags_are_written_by_their_names(lms: torchlms.LMS, tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    with lms, StepLog(lms, path) as log:
        log.step(phase="train", epoch=0)
        log.step(epoch=1, phase="validate")
        with pytest.raises(ValueError, match=r"\['seconds', 'step'\]: these columns are the log's own"):
            StepLog(lms).step(seconds=3, step=7)
    rows = list(csv.DictReader(path.open()))
    assert [(row["phase"], row["epoch"]) for row in rows] == [("train", "0"), ("validate", "1")]


def test_averages_of_some_steps(lms: torchlms.LMS) -> None:
    with lms, StepLog(lms, skip=1) as log:
        for phase in ("train", "train", "validate", "train"):
            time.sleep(0.02 if phase == "validate" else 0)
            log.step(phase=phase)
    assert log.averages()["steps"] == 3
    assert log.averages(phase="train")["steps"] == 2
    assert log.averages(phase="train")["seconds"] < 0.02 < log.averages(phase="validate")["seconds"]
    assert log.averages(phase="test") == {}


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no such device")
def test_a_full_disk_ends_the_file_and_not_the_training(
    lms: torchlms.LMS, caplog: pytest.LogCaptureFixture
) -> None:
    with lms, StepLog(lms, "/dev/full", skip=0) as log:
        for _ in range(3):
            log.step()
    assert len(log.rows) == log.averages()["steps"] == 3
    said = [record.message for record in caplog.records if "/dev/full" in record.message]
    assert said == ["/dev/full ends here, training goes on: No space left on device"]


def test_what_can_be_no_log(lms: torchlms.LMS) -> None:
    for wrong in ({"skip": -1}, {"batch_size": -4}):
        with pytest.raises(ValueError, match="must be 0 or more"):
            StepLog(lms, **wrong)
    with pytest.raises(TypeError, match="lms must be an LMS, not None"):
        StepLog(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="writer must have add_scalar"):
        StepLog(lms, writer="runs")  # type: ignore[arg-type]


def test_a_profile_that_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(torchlms.BadOption, match="its folder does not exist"):
        ProfileWindow(tmp_path / "nowhere" / "trace.json")


@pytest.mark.parametrize("steps", [6, 4])
def test_some_steps_are_profiled(steps: int, tmp_path: Path) -> None:
    """Also of a loop that ends before the window does."""
    path = tmp_path / "trace.json"
    with ProfileWindow(path, first=3, last=4) as window:
        for step in range(steps):
            torch.ones(2) + 1 if step < 3 or step == 5 else torch.ones(2) * 2
            window.step()
            assert path.exists() is (step >= 4)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::mul" in names
    assert "aten::add" not in names


def test_a_window_that_is_never_reached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ProfileWindow(tmp_path / "trace.json", first=9, last=9) as window:
        window.step()
    assert not (tmp_path / "trace.json").exists()
    assert "no step was profiled: the loop ended after 1 steps, before step 9" in caplog.text
    with pytest.raises(ValueError, match="first comes first"):
        ProfileWindow(tmp_path / "trace.json", first=3, last=2)


def test_tensorboard_reads_what_was_written(lms: torchlms.LMS, tmp_path: Path) -> None:
    """With the real writer, and read back by TensorBoard itself."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer, lms, StepLog(lms, writer=writer) as log:
        rows = [log.step() for _ in range(STEPS)]
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["scalars"]
    written_names = asdict(rows[0]).keys() - {"step", "items_per_s", "tags"}  # without a batch size no rate
    assert sorted(tags) == sorted(f"torchlms/{name}" for name in written_names)
    written = events.Scalars("torchlms/seconds")
    assert [event.step for event in written] == list(range(STEPS))
    assert [event.value for event in written] == pytest.approx([row.seconds for row in rows])


def test_the_rate_is_that_of_all_steps_together(lms: torchlms.LMS) -> None:
    with lms, StepLog(lms, skip=0, batch_size=8) as log:
        for pause_s in (0.0, 0.05, 0.0):
            time.sleep(pause_s)
            log.step()
    averages = log.averages()
    assert averages["items_per_s"] == pytest.approx(8 / averages["seconds"])
