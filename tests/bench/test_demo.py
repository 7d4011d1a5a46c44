"""The demo: two runs, one table, and an error if a bit differs."""

from __future__ import annotations

from typing import Any

import pytest

from torchlms.bench import demo as demo_module
from torchlms.bench.options import BenchOptions, Way

TINY = BenchOptions(model="mnist", batch_size=2, image_size=28, num_batches=1, warmup=1, device="cpu")


def fake_run(lms_losses: list[str], seen: list[BenchOptions]) -> Any:
    def run_apart(options: BenchOptions, *, timeout_s: float) -> dict[str, Any]:
        seen.append(options)
        return {
            "losses": lms_losses if options.way is Way.LMS else ["0x1.0p+1", "0x1.0p+0"],
            "peak_device_bytes": 600 if options.way is Way.LMS else 1000,
            "peak_reserved_bytes": 0,
            "step_s": {"median": 0.25},
            "bytes_out_per_step": 300,
            "bytes_in_per_step": 300,
            "disk_bytes_per_step": 300,
        }

    return run_apart


def test_the_budget_is_a_share_of_the_plain_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BenchOptions] = []
    rows: list[Any] = []
    lines: list[str] = []
    monkeypatch.setattr(demo_module, "run_apart", fake_run(["0x1.0p+1", "0x1.0p+0"], seen))
    put: list[Any] = []
    identity = demo_module.demo(lines.append, lambda columns, body: rows.extend(body), TINY, put=put.append)
    assert [put[0]["plain"]["losses"], put[0]["lms"]["losses"]] == [["0x1.0p+1", "0x1.0p+0"]] * 2
    assert put[0]["losses"] == {"steps": 2, "first_difference": None}
    assert identity.first_difference is None
    assert [options.way for options in seen] == [Way.NONE, Way.LMS]
    assert seen[1].budget == "600"
    assert seen[1].disk_dir is not None
    assert ["peak memory", "1000 B", "600 B"] in rows
    assert lines[-1] == "losses: identical over 2 steps"


def test_a_differing_loss_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "run_apart", fake_run(["0x1.0p+1", "0x1.8p+0"], []))
    with pytest.raises(demo_module.DemoFailed, match="step 2"):
        demo_module.demo(lambda line: None, lambda columns, body: None, TINY)


def test_a_failed_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "run_apart", lambda options, timeout_s: {"error": "no memory"})
    with pytest.raises(demo_module.DemoFailed, match="the run none failed: no memory"):
        demo_module.demo(lambda line: None, lambda columns, body: None, TINY)
