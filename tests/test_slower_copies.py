"""The benchmark of slower copies: both plans of a case, and the steps that the simulator foretells."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from torchlms.bench import provenance
from torchlms.core import joint
from torchlms.core.planned import SLOWER

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import slower_copies  # noqa: E402


def test_one_case_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, batch_size = slower_copies.CASES["joint-resnet50-b400"]
    small = replace(options, image_size=32)
    monkeypatch.setattr(slower_copies, "CASES", {"joint-resnet50-b400": (small, 4 * batch_size)})
    monkeypatch.setattr(joint, "SETS", 12)
    path = tmp_path / "slower.json"
    assert slower_copies.main(["--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["schema"] == "torchlms.slower-copies/1"
    assert result["code"] == provenance.code_hash()
    assert result["counted_on"] == SLOWER
    assert [case["way"] for case in result["cases"]] == list(slower_copies.WAYS.values())
    for case in result["cases"]:
        for kind in ("bold", "wary"):
            steps_s = [case[kind]["step_s"][str(speed)] for speed in slower_copies.SPEEDS]
            assert steps_s == sorted(steps_s), "the slower the copies, the longer the step"
        slowest = str(slower_copies.SPEEDS[-1])
        expected = case["wary"]["step_s"][slowest] / case["bold"]["step_s"][slowest]
        assert result["of_bold"][case["way"]][slowest] == pytest.approx(expected)
        assert case["way"] == "with recompute" or not case["wary"]["values_dropped"]
