"""Host memory that was planned and is not to be had: training goes on, with the same bits, and says so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from sessions import SMALL, plain_peak, run_lms, run_plain
from small_networks import NETWORKS

from torchlms.errors import HostBudgetTooSmall
from torchlms.memory.store import Store

NETWORK = NETWORKS["resnet"]
MOST = 4  # refusals of one plan after another, before a plan is kept all the same


def refuse(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Have the store refuse so many arenas; returns the host budget at each request."""
    asked: list[int] = []
    real = Store.plan_arena

    def plan_arena(store: Store, size_bytes: int) -> None:
        asked.append(store.host_budget_bytes)
        if len(asked) <= times:
            raise HostBudgetTooSmall("cannot pin host memory", missing_bytes=1 << 20)
        real(store, size_bytes)

    monkeypatch.setattr(Store, "plan_arena", plan_arena)
    return asked


@pytest.mark.parametrize("times", [1, 2, MOST, 100])
def test_training_goes_on(
    times: int, spill_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run_plain(NETWORK)
    budget_bytes = int(0.7 * plain_peak(NETWORK))
    asked = refuse(monkeypatch, times)
    with caplog.at_level(logging.WARNING, "torchlms"):
        watched = run_lms(NETWORK, budget_bytes, spill_dir)
    assert watched.outcome.differences(plain) == []
    assert watched.moved_bytes > 0
    assert watched.peak_bytes <= budget_bytes
    assert watched.plan is not None, "a plan without pinned memory is still a plan"
    said = [record.message for record in caplog.records if "cannot pin" in record.message]
    assert said
    assert "Planning again" in said[0]
    assert asked == sorted(asked, reverse=True), "each plan asks for less host memory than the one before"
    assert len(set(asked)) > 1


def test_the_same_refusal_is_not_met_for_ever(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuse(monkeypatch, 100)
    run_lms(NETWORK, int(0.7 * plain_peak(NETWORK)), spill_dir)
    assert len(asked) <= MOST + 4  # one for each plan that is adopted later


def test_without_a_plan(spill_dir: Path) -> None:
    """Nothing is recorded or planned; values leave when memory runs out, and only then."""
    plain = run_plain(NETWORK)
    budget_bytes = int(0.7 * plain_peak(NETWORK))
    options: dict[str, Any] = {"plan": False, "rules": SMALL}
    watched = run_lms(NETWORK, budget_bytes, spill_dir, **options)
    assert watched.outcome.differences(plain) == []
    assert watched.plan is None
    assert watched.stats["state"] == "improvise"
    assert watched.stats["record_steps"] == 0
    assert watched.stats["reclaims"] > 0
    assert watched.peak_bytes <= budget_bytes
