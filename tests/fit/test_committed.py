"""The line through two measured batches against larger ones: what docs/fit.md says of a GPU."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SMALL, LARGE = 150, 200
BYTES_ERROR, TIME_ERROR = 0.03, 0.02


def plain(batch: int) -> tuple[int, float]:
    """Peak bytes and median seconds of the plain run of ResNet-50, no cap, from the committed file."""
    path = RESULTS / f"resnet50-b{batch}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    entry = next(item for item in json.loads(path.read_text())["entries"] if item["way"] == "none")
    return entry["peak_device_bytes"], entry["step_s"]["median"]


@pytest.mark.parametrize("batch", [225, 250, 300, 400])
def test_measured_steps_lie_near_the_line(batch: int) -> None:
    run = Fraction(batch - SMALL, LARGE - SMALL)
    lines = [
        small + (large - small) * float(run) for small, large in zip(plain(SMALL), plain(LARGE), strict=True)
    ]
    peak_bytes, step_s = plain(batch)
    assert lines[0] == pytest.approx(peak_bytes, rel=BYTES_ERROR)
    assert lines[1] == pytest.approx(step_s, rel=TIME_ERROR)
