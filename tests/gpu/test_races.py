"""Races on streams: backward in any order, each copy behind a sleep of its own, memory poisoned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from branches import NETWORK, shuffled
from hazards import delay_streams, poison_memory
from sessions import new_session, outcome, train_plainly

import torchlms
from tests.gpu.networks import GIB

pytestmark = pytest.mark.gpu
STEPS = 6
SEEDS = range(6)
STAGING_BYTES = 96 << 10  # of host memory: what goes to disk passes through it
ALL_MOVE = {"min_bytes": 512, "move_ops": ["*"], "recompute": False}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("host_budget", [2 * GIB, STAGING_BYTES], ids=["host", "disk"])
def test_any_order_has_plain_bits(
    seed: int, host_budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = shuffled(seed)
    with torch.device("cuda"):
        plain = train_plainly(NETWORK, loop, STEPS)
        assert train_plainly(NETWORK, loop, STEPS).differences(plain) == []
        delay_streams(monkeypatch, seed)
        poison_memory(monkeypatch)
        session = new_session(NETWORK)
        with torchlms.LMS(
            session.model,
            session.optimizer,
            budget=2 * GIB,
            host_budget=host_budget,
            disk_dir=tmp_path,
            disk_budget=2 * GIB,
            rules=ALL_MOVE,
        ) as lms:
            for step in range(STEPS):
                loop(session, step)
            stats = lms.stats()
        assert outcome(session).differences(plain) == []
    assert stats["bytes_out_per_step"] > 0
    assert bool(stats["disk_bytes_per_step"]) is (host_budget == STAGING_BYTES)
