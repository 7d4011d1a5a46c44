"""One run: its lines, its JSON, its CSV, its flags; with a stand-in for LMS."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from torchlms.bench import runner
from torchlms.bench.arguments import to_arguments
from torchlms.bench.command import BenchCommand, NotIdentical, bench
from torchlms.bench.compare import rival_options, run_apart
from torchlms.bench.options import BenchOptions, Way
from torchlms.bench.result import SCHEMA, failed_json, result_json
from torchlms.bench.runner import RunFailed, run
from torchlms.errors import BadOption
from torchlms.outlet import outlet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PLAIN = BenchOptions(
    model="mnist", batch_size=4, num_batches=4, warmup=2, display_every=2, device="cpu", way=Way.NONE
)

# design: what `bench --json` writes at least.
KEYS = {
    *("schema", "model", "batch_size", "image_size", "dtype", "device", "torch", "lms", "budget_bytes"),
    *("steps", "step_s", "items_per_s", "losses", "peak_device_bytes", "peak_reserved_bytes"),
    *("peak_host_bytes", "bytes_out_per_step", "bytes_in_per_step", "disk_bytes_per_step"),
    *("recompute_s_per_step", "reclaims", "plan", "predicted", "plan_s"),
}

STATS: dict[str, Any] = {
    "state": "guard",
    "steps": 6,
    "budget_bytes": 1000,
    "peak_device_bytes": 900,
    "peak_reserved_bytes": 950,
    "peak_host_bytes": 300,
    "bytes_out_per_step": 200,
    "bytes_in_per_step": 100,
    "disk_bytes_per_step": 50,
    "recompute_s_per_step": 0.0,
    "reclaims": 3,
    "plan": {"keep": {"values": 1, "bytes": 2}},
    "predicted": {"peak_device_bytes": 910, "peak_reserved_bytes": 960, "step_s": 0.5},
    "plan_s": 0.1,
    "record_steps": 2,
}


class StubLMS:
    def stats(self) -> dict[str, Any]:
        return dict(STATS)

    def report(self) -> str:
        return "what was decided"


@pytest.fixture
def stub_lms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    events: list[str] = []

    @contextlib.contextmanager
    def open_stub(workload: Any, options: BenchOptions) -> Iterator[StubLMS]:
        events.append(f"open {options.budget}")
        yield StubLMS()
        events.append("closed")

    monkeypatch.setattr(runner, "open_lms", open_stub)
    return events


def test_lines_of_a_plain_run() -> None:
    lines: list[str] = []
    run(PLAIN, lines.append)
    text = "\n".join(lines)
    for heading in ("Model:", "Mode:", "Batch size:", "Device:", "Data format:", "Budget:"):
        assert heading in text
    assert "Step\tImg/sec\ttotal_loss" in lines
    steps = [line for line in lines if re.match(r"\d+\t", line)]
    assert [line.split("\t")[0] for line in steps] == ["1", "2", "4"]
    pattern = r"\d+\timages/sec: \d+\.\d \+/- \d+\.\d \(jitter = \d+\.\d\)\t\d+\.\d{3}"
    assert all(re.fullmatch(pattern, line) for line in steps)
    total = lines.index(next(line for line in lines if re.fullmatch(r"total images/sec: \d+\.\d\d", line)))
    assert set(lines[total - 1]) == {"-"}


def test_json_of_a_plain_run() -> None:
    result = json.loads(json.dumps(result_json(run(PLAIN, lambda line: None))))
    assert set(result) >= KEYS
    assert result["schema"] == SCHEMA == "torchlms.bench/1"
    assert (result["lms"], result["way"], result["steps"], result["warmup_steps"]) == (False, "none", 4, 2)
    assert set(result["step_s"]) == {"median", "min", "max"}
    assert len(result["losses"]) == 6
    assert all(float.fromhex(loss) > 0 for loss in result["losses"])
    assert result["peak_device_bytes"] > 3 * 4 * result["parameters"]
    assert len(result["code"]) == 64
    assert result["flags"]["cudnn_benchmark"] is False
    assert result["host"]["cpus"] >= 1


def test_two_runs_have_the_same_losses() -> None:
    first, second = (run(PLAIN, lambda line: None) for _ in range(2))
    assert [step.loss.hex() for step in first.steps] == [step.loss.hex() for step in second.steps]
    assert len({step.loss for step in first.steps}) > 1


def test_tokens_are_counted_for_the_language_model() -> None:
    lines: list[str] = []
    options = BenchOptions(
        model="llama", batch_size=2, num_batches=1, warmup=0, device="cpu", way=Way.NONE,
        hidden=32, layers=2, heads=2, sequence=8, vocab=50,
    )  # fmt: skip
    measurement = run(options, lines.append)
    assert measurement.items_per_step == 16
    assert measurement.options.optimizer == "adamw"
    assert "Step\tTokens/sec\ttotal_loss" in lines
    assert result_json(measurement)["sizes"]["hidden"] == 32


def test_lms_figures_reach_lines_json_and_csv(stub_lms: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    command = BenchCommand(
        options=BenchOptions(model="mnist", batch_size=4, num_batches=2, device="cpu", budget="1GiB"),
        csv_path=tmp_path / "r.csv",
        report=True,
    )
    with outlet(tmp_path / "r.json") as put:
        bench(command, lines.append, lambda columns, rows: None, put)
    assert stub_lms == ["open 1GiB", "closed"]
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["lms"] is True
    assert result["warmup_steps"] == 5
    for name in ("budget_bytes", "peak_device_bytes", "peak_reserved_bytes", "plan", "predicted", "plan_s"):
        assert result[name] == STATS[name]
    assert any(
        line.startswith("predicted: peak 910 B, step 500.0 ms; measured: peak 900 B") for line in lines
    )
    assert "what was decided" in lines
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(n) for n in range(1, 8)]
    assert [row["timed"] for row in rows] == ["0"] * 5 + ["1"] * 2
    assert (rows[0]["reclaims"], rows[1]["reclaims"]) == ("3", "0")
    assert (rows[6]["bytes_out"], rows[6]["bytes_in"], rows[6]["peak_bytes"]) == ("200", "100", "900")


def test_running_out_of_memory_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("torchlms.bench.workload.Workload.step", fail)
    path = tmp_path / "failed.json"
    said = r"mnist batch 4, none: out of memory in step 1: CUDA out of"
    with pytest.raises(RunFailed, match=said), outlet(path) as put:
        bench(BenchCommand(PLAIN), lambda line: None, lambda columns, rows: None, put)
    result = json.loads(path.read_text())
    assert "Tried to allocate 2 GiB" in result["error"]
    assert result["way"] == "none"


def fake_rival(options: BenchOptions, *, timeout_s: float) -> dict[str, Any]:
    if options.way is Way.NONE:
        result = result_json(run(options, lambda line: None))
        result["losses"][3] = "0x1.0p+0"
        return result
    return failed_json(options, "CUDA out of memory\nsecond line")


def test_failing_rivals_are_rows_and_differing_losses_are_named(
    monkeypatch: pytest.MonkeyPatch, stub_lms: list[str]
) -> None:
    monkeypatch.setattr("torchlms.bench.command.run_apart", fake_rival)
    lines: list[str] = []
    tables: list[Any] = []
    command = BenchCommand(
        options=BenchOptions(model="mnist", batch_size=4, num_batches=2, device="cpu", budget="1GiB"),
        compare=(Way.NONE, Way.CHECKPOINT),
    )
    result = bench(command, lines.append, lambda columns, rows: tables.append(rows))
    assert [rival["way"] for rival in result["compare"]] == ["none", "checkpoint"]
    assert result["compare"][0]["warmup_steps"] == 5  # as many as LMS, or the losses would not line up
    assert result["compare"][1]["error"] == "CUDA out of memory"
    assert [row[0] for row in tables[0]] == ["lms", "none", "checkpoint"]
    assert tables[0][2][-1] == "CUDA out of memory"
    assert "losses: differ from step 4 of 7" in lines
    assert result["identity"]["first_difference"] == 4
    with pytest.raises(NotIdentical, match="step 4"):
        bench(BenchCommand(command.options, identity=True), lambda line: None, lambda columns, rows: None)


@pytest.mark.more
def test_a_rival_in_its_own_process_and_one_that_dies() -> None:
    good = run_apart(PLAIN, timeout_s=120)
    assert good["losses"] == result_json(run(PLAIN, lambda line: None))["losses"]
    assert good["command"].startswith("torchlms bench --model mnist")
    bad = run_apart(BenchOptions(model="mnist", device="cpu", way=Way.NONE, cap="1GiB"), timeout_s=120)
    assert "needs the CUDA allocator" in bad["error"]


def test_a_rival_that_takes_too_long() -> None:
    assert run_apart(PLAIN, timeout_s=0.01)["error"] == "no result in 0.01 s"


def test_deterministic_is_set_recorded_and_undone() -> None:
    measurement = run(
        BenchOptions(
            model="mnist", batch_size=2, num_batches=1, warmup=0, device="cpu", way=Way.NONE,
            deterministic=True, cudnn_benchmark=True,
        ),
        lambda line: None,
    )  # fmt: skip
    assert measurement.flags.deterministic
    assert measurement.flags.cudnn_deterministic
    assert measurement.flags.cudnn_benchmark
    assert measurement.flags.cublas_workspace_config
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "int8"}, "--dtype int8"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"device": "meta"}, "--device meta is not supported: choose cuda or cpu"),
        ({"device": "toaster"}, "--device toaster: choose cuda, cuda:1 or cpu"),
        ({"optimizer": "lion"}, "--optimizer lion"),
        ({"num_batches": 0}, "at least 1"),
        ({"way": Way.LMS, "cap": "1GiB"}, "--cap is for runs without LMS"),
        ({"way": Way.NONE, "plan": "p.json"}, "--plan needs LMS"),
        ({"image_size": 4}, "at least 8"),
        ({"budget": "16G"}, "--budget: .*16GiB"),
    ],
)
def test_bad_options(change: dict[str, Any], said: str) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    options = BenchOptions(**{"model": "mnist", "device": "cpu", "way": Way.NONE, **change})
    with pytest.raises(BadOption, match=said):
        run(options, lambda line: None)


def test_the_folder_of_a_result_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="folder does not exist"):
        bench(
            BenchCommand(PLAIN, csv_path=tmp_path / "no" / "r.csv"),
            lambda line: None,
            lambda columns, rows: None,
        )
    with pytest.raises(BadOption, match="folder does not exist"), outlet(tmp_path / "no" / "r.json"):
        pass


def test_rivals_get_no_option_of_lms() -> None:
    """They refuse them."""
    ours = BenchOptions(model="mnist", budget="1GiB", recompute=True, rule=("min_bytes=1MiB",), verify=True)
    ours = replace(ours, verify_every=2, snapshot=True, plan="p.json")
    assert to_arguments(rival_options(ours, Way.NONE, cap=False)) == ["--model", "mnist", "--way", "none"]
