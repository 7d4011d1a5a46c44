"""The benchmark of planning: it tells each time of a plan, or why there is none, and what was missed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from torchlms.bench import provenance
from torchlms.core import joint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import planning  # noqa: E402


def test_a_tiny_network_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SHARES", (0.8, 0.01))
    monkeypatch.setattr(joint, "SETS", 12)  # on short tapes more are tried than on long ones
    path = tmp_path / "planning.json"
    assert planning.main(["--layers", "1", "--repeats", "2", "--json", str(path)]) == 1, "too few ops"
    result = json.loads(path.read_text())
    assert result["schema"] == "torchlms.planning/1"
    assert result["code"] == provenance.code_hash()
    assert [tape["layers"] for tape in result["tapes"]] == [1, 2]
    for tape in result["tapes"]:
        kinds = [(one["plan"], one["share"]) for one in tape["plans"]]
        assert kinds == [("moving", 0.8), ("joint", 0.8), ("moving", 0.01), ("joint", 0.01)]
        moving, joined, *without = tape["plans"]
        for one in (moving, joined):
            assert len(one["seconds"]) == len(one["plan_s"]) == 2
            assert max(one["plan_s"]) <= one["slowest_s"] == max(one["seconds"])
            assert one["predicted_step_s"] >= tape["compute_s"] * (1 - 1e-9)
        assert moving["values_moved"] > 0 == moving["values_dropped"]
        assert joined["values_dropped"] > 0
        assert all("too small" in one["why_none"] for one in without)
        assert tape["peak_bytes"] == pytest.approx(82372171264, rel=1e-6), "that of the large network"
    met = {target["figure"]: target["met"] for target in result["targets"]}
    assert met == {"ops": False, "faults": True, "moving_s": True, "joint_s": True}


@pytest.mark.parametrize(
    ("times", "missed"),
    [
        ([("moving", 2.0), ("joint", 5.0)], []),
        ([("moving", 1.0), ("moving", 2.1), ("joint", 5.0)], ["moving_s"]),
        ([("moving", 2.0), ("joint", 5.1), ("joint", 1.0)], ["joint_s"]),
        ([("moving", 2.0)], ["joint_s"]),
    ],
)
def test_the_slowest_plan_of_the_first_tape_counts(times: list[tuple[str, float]], missed: list[str]) -> None:
    plans: list[dict[str, Any]] = [{"plan": kind, "slowest_s": seconds} for kind, seconds in times]
    plans.append({"plan": "joint", "why_none": "a device budget of 1 B is too small"})
    longer = {"ops": 20_000, "plans": [{"plan": "moving", "slowest_s": 9.0}]}
    targets = planning.judged({"ops": 10_000, "plans": plans}, longer)
    assert [target["figure"] for target in targets if not target["met"]] == missed


def test_a_plan_that_does_not_hold_is_a_miss_in_any_tape() -> None:
    first, second = (
        {
            "ops": 10_000,
            "plans": [{"plan": kind, "slowest_s": 1.0, "faults": faults} for kind in planning.MOST_S],
        }
        for faults in (0, 1)
    )
    missed = [target["figure"] for target in planning.judged(first, second) if not target["met"]]
    assert missed == ["faults"]
