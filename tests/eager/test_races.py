"""Backward in any order, with slow copies and poisoned memory: the same bits as plain in that order."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from branches import NETWORK, shuffled
from hazards import delay_disk, poison_memory
from sessions import Watched, more, plain_peak, run_lms, run_plain, slow_disk

from torchlms.eager.slot import Slot
from torchlms.errors import BudgetTooSmall

STEPS = 6
SEEDS = [0, more(1), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]
SMALL = {"min_bytes": 512, "recompute": False}
# Rules, and the budget as a share of the plain peak. Graphs that are retained leave no plan much to gain.
WAYS = {
    "as memory runs out": (SMALL, 0.8),
    "by a plan": ({**SMALL, "move_ops": ["*"]}, 1.5),
    "dropped": ({**SMALL, "recompute": True}, 0.95),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("way", WAYS)
def test_any_order_has_plain_bits(
    seed: int, way: str, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, share = WAYS[way]
    if way == "dropped":
        slow_disk(monkeypatch)
    watched, differences = raced(seed, rules, share, spill_dir, monkeypatch)
    assert differences == []
    assert watched.moved_bytes > 0 or watched.stats["replayed_ops"] > 0
    assert way != "by a plan" or watched.plan.moves


def raced(
    seed: int, rules: dict[str, Any], share: float, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Watched, list[str]]:
    """A run with slow copies and poisoned memory, and where it differs from plain."""
    loop = shuffled(seed)
    plain = run_plain(NETWORK, loop, STEPS)
    budget_bytes = int(share * plain_peak(NETWORK, loop, STEPS))
    delay_disk(monkeypatch, seed)
    poison_memory(monkeypatch)
    watched = run_lms(NETWORK, budget_bytes, spill_dir, loop, STEPS, rules=rules)
    assert watched.peak_bytes <= budget_bytes
    return watched, watched.outcome.differences(plain)


def test_orders_differ() -> None:
    """Or else there would be nothing to the seeds: another order of adding gradients gives other bits."""
    gradients = {tuple(run_plain(NETWORK, shuffled(seed), STEPS).parameters.values()) for seed in range(3)}
    assert len(gradients) > 1


def test_a_copy_that_nobody_waits_for_shows(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: without the wait for what comes back somebody reads what is not there yet."""

    def take_at_once(self: Slot) -> None:
        if self.copy_out is not None:  # or the memory of what left would still be held, and no run would end
            self.copy_out.wait()
        self.copy_in = None

    monkeypatch.setattr(Slot, "_settle", take_at_once)
    for seed in range(8):
        with contextlib.suppress(BudgetTooSmall):
            _, differences = raced(seed, *WAYS["by a plan"], spill_dir, monkeypatch)
            assert differences
            return
    pytest.fail("no run ended, so nothing was shown")
