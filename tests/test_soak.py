"""The soak fails on what grows, on other bits, on what is left and on too little time, and not otherwise."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import soak  # noqa: E402
import soak_sample  # noqa: E402
from soak_course import COURSES, Trace  # noqa: E402
from soak_sample import BOUNDS, Sample, grown  # noqa: E402

MANY = 10_000_000_000
CALM = Sample(
    step=1,
    step_s=0.1,
    rss_bytes=MANY,
    device_bytes=MANY,
    reserved_bytes=MANY,
    host_bytes=MANY,
    pinned_bytes=MANY,
    spill_bytes=MANY,
    spill_file_bytes=MANY,
    objects=MANY,
    threads=10,
    open_files=10,
)


def test_what_stays_as_it_is_has_not_grown() -> None:
    assert grown([CALM] * 8) == []


@pytest.mark.parametrize("name", BOUNDS)
def test_each_figure_that_grows_is_named(name: str) -> None:
    more = replace(CALM, **{name: getattr(CALM, name) * 1.3})
    (said,) = grown([CALM] * 6 + [more] * 2)
    assert said.startswith(f"{name} grew from ")
    assert grown([more] * 2 + [CALM] * 6) == [], "the first quarter still plans"


def test_traces_are_compared_as_far_as_both_have_come() -> None:
    plain = Trace(["a", "b", "c"], {2: "x", 3: "y"})
    assert plain.same_as(Trace(["a", "b"], {2: "x"}))
    assert not plain.same_as(Trace(["a", "c"], {}))
    assert not plain.same_as(Trace(["a", "b"], {2: "y"}))


def test_a_round_has_every_shape_once_in_another_order() -> None:
    course = COURSES["cpu"]()
    count = len(course.shapes)
    rounds = [[course.shape(lap * count + place) for place in range(count)] for lap in range(4)]
    assert all(sorted(one) == sorted(course.shapes) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def whole_pool(threads: int, **options: Any) -> ThreadPoolExecutor:
    """A pool whose threads all begin now, and not as copies come to overlap."""
    pool = ThreadPoolExecutor(threads, **options)
    together = threading.Barrier(threads)
    for _ in range(threads):
        pool.submit(together.wait)
    return pool


@pytest.mark.more
def test_a_short_soak_from_end_to_end(
    unfrozen: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setitem(BOUNDS, "step_s", soak_sample.Bound(100))  # so few steps are still being planned
    monkeypatch.setitem(BOUNDS, "objects", soak_sample.Bound(2))
    monkeypatch.setattr("torchlms.memory.disk.ThreadPoolExecutor", whole_pool)
    monkeypatch.setitem(BOUNDS, "spill_file_bytes", soak_sample.Bound(1, 1 << 30))
    monkeypatch.setitem(BOUNDS, "rss_bytes", soak_sample.Bound(2))
    path = tmp_path / "soak.json"
    assert soak.main(["--steps", "48", "--every", "12", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    result = json.loads(path.read_text())
    assert result["same_bits"] is True
    assert result["steps"] == 48
    assert len(result["samples"]) == 4
    assert set(result["growth"]) == set(BOUNDS)


def test_a_soak_that_is_cut_short_fails_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    assert soak.main(["--steps", "12", "--every", "3", "--within", "0.001", "--json", str(path)]) == 1
    assert "0 of 12 steps in 0 s" in json.loads(path.read_text())["wrong"]
