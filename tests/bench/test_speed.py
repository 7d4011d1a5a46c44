"""The figures of one line, by hand."""

from __future__ import annotations

import math

import pytest

from torchlms.bench.compare import compare_losses
from torchlms.bench.output import step_line
from torchlms.bench.speed import speed, spread


def test_mean_is_all_items_over_all_seconds() -> None:
    rate = speed(10, [1.0, 3.0])
    assert rate.mean == 5.0
    # speeds 10 and 10/3: population deviation 10/3, over sqrt(2)
    assert rate.uncertainty == pytest.approx(10 / 3 / math.sqrt(2))
    assert rate.jitter == pytest.approx(1.4826 * 10 / 3)


def test_jitter_ignores_one_outlier() -> None:
    assert speed(1, [1.0] * 9 + [100.0]).jitter == 0.0


def test_one_step_has_no_uncertainty() -> None:
    rate = speed(8, [2.0])
    assert (rate.mean, rate.uncertainty, rate.jitter) == (4.0, 0.0, 0.0)


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == type(spread([1.0]))(median=2.0, min=1.0, max=3.0)


def test_line_reads_like_tf_cnn_benchmarks() -> None:
    assert step_line(10, 10, [1.0, 1.0], 7.1234, "images") == (
        "10\timages/sec: 10.0 +/- 0.0 (jitter = 0.0)\t7.123"
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (["a", "b"], ["a", "b"], "losses: identical over 2 steps"),
        (["a", "b", "c"], ["a", "x", "c"], "losses: differ from step 2 of 3"),
        (["a"], ["a", "b"], "losses: differ from step 2 of 2"),
        ([], [], "losses: nothing to compare"),
    ],
)
def test_losses_compare_by_hex(ours: list[str], theirs: list[str], said: str) -> None:
    assert str(compare_losses(ours, theirs)) == said
