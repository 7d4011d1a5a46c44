"""Identity: training under any budget that works leaves the bits that it leaves without LMS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sessions import (
    maybe_lms,
    more,
    new_session,
    outcome,
    plain_peak,
    plain_step,
    run_lms,
    run_plain,
    smallest_budget,
)
from small_networks import NETWORKS

from torchlms.core.plan import Choice

SHARES = {"100%": 1.0, "60%": 0.6, "35%": 0.35, "smallest": 0.0}


@pytest.mark.parametrize("share", [more(share) if share == "60%" else share for share in SHARES])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_bits_within_the_budget(name: str, share: str, spill_dir: Path) -> None:
    network = NETWORKS[name]
    plain, peak_bytes = run_plain(network), plain_peak(network)
    smallest_bytes = smallest_budget(network, spill_dir)
    budget_bytes = max(int(SHARES[share] * peak_bytes), smallest_bytes)
    watched = run_lms(network, budget_bytes, spill_dir)

    assert watched.outcome.differences(plain) == []
    assert plain.parameters != outcome(new_session(network)).parameters, "the network has not learnt"
    assert plain.gradients
    assert plain.states
    assert 0 < watched.peak_bytes <= budget_bytes
    if share == "100%":
        assert watched.moved_bytes == 0
    else:
        assert smallest_bytes < 0.9 * peak_bytes, "this network is no test of moving"
        assert watched.stats["bytes_out_per_step"] > 0
        assert watched.stats["bytes_in_per_step"] > 0
        assert watched.stats["plan"]["disk"]["values"] > 0
        assert watched.stats["disk_bytes_per_step"] == watched.stats["bytes_out_per_step"]
        assert any(decision.choice is Choice.DISK for decision in watched.plan.moves)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_predicted_is_what_was_measured(name: str, spill_dir: Path) -> None:
    network = NETWORKS[name]
    budget_bytes = max(int(0.6 * plain_peak(network)), smallest_budget(network, spill_dir))
    stats = run_lms(network, budget_bytes, spill_dir).stats
    predicted, measured = stats["predicted"]["peak_device_bytes"], stats["peak_device_bytes"]
    assert abs(predicted - measured) <= 0.05 * measured
    assert stats["strayed"] == stats["replans"] == 0
    assert stats["record_steps"] == 1


def test_every_value_moves_when_told_to(spill_dir: Path) -> None:
    """A rule sends everything out, within a budget that would hold it all."""
    network = NETWORKS["transformer"]
    plain = run_plain(network)
    rules = {"move_modules": ("*",), "min_bytes": 0}
    watched = run_lms(network, 4 * plain_peak(network), spill_dir, rules=rules)
    assert watched.outcome.differences(plain) == []
    moved, kept = watched.stats["plan"]["disk"], watched.stats["plan"]["keep"]
    assert moved["values"] > 10 * max(1, kept["values"])


def test_a_longer_run_with_a_schedule_and_clipping(spill_dir: Path) -> None:
    network = NETWORKS["resnet"]

    def train(budget: int | None) -> object:
        session = new_session(network)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(session.optimizer, 12)
        with maybe_lms(session, budget, spill_dir):
            for step in range(12):
                plain_step(session, step)
                torch.nn.utils.clip_grad_norm_(session.model.parameters(), 0.1)
                schedule.step()
        return outcome(session)

    budget_bytes = max(int(0.6 * plain_peak(network)), smallest_budget(network, spill_dir))
    assert train(budget_bytes) == train(None)
