"""Values made from two versions of one tensor, of which autograd saves the later one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from known_times import know_times
from sessions import bits, slow_disk
from torch import nn

import torchlms
from torchlms.bench.peak import LedgerMode
from torchlms.core.plan import Choice
from torchlms.eager.provenance import Provenance
from torchlms.memory.ledger import Ledger

ROWS, WIDTH, STEPS = 256, 64, 12


class TwoVersions(nn.Module):
    """One op reads ``scaled`` before a write, another afterwards; from step ``late`` on the write is real."""

    def __init__(self, late: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.late = late
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = layer(x)
            scaled = h.detach() * 1.1
            before = scaled.sin()
            if self.step >= self.late:
                scaled.add_(0.5)
            else:
                scaled.add(0.5)
            both = before + scaled
            x = (both * h).tanh() + scaled * h.sigmoid()
        self.step += 1
        return x


def train(late: int, around: Any = None) -> tuple[list[str], Any]:
    torch.manual_seed(3)
    model = TwoVersions(late)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    found = []

    def step() -> None:
        optimizer.zero_grad()
        loss = model(torch.randn(ROWS, WIDTH)).square().mean()
        loss.backward()
        optimizer.step()
        found.extend([bits(loss), *(bits(item) for item in model.parameters())])

    if around is None:
        for _ in range(STEPS):
            step()
        return found, None
    with around(model, optimizer) as lms:
        for _ in range(STEPS):
            step()
        return found, lms


@pytest.fixture(scope="module")
def peak_bytes() -> int:
    ledger = Ledger()
    with LedgerMode(ledger, torch.device("cpu")):
        train(0)
    return ledger.peak_bytes


@pytest.mark.parametrize("late", [0, 8])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.7])
def test_same_bits_as_planned(
    late: int,
    share: float,
    peak_bytes: int,
    spill_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where the write comes when all recipes are trusted: they are of the step that runs."""
    know_times(monkeypatch)
    slow_disk(monkeypatch)
    caplog.set_level(logging.DEBUG, logger="torchlms")

    def around(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        rules = {"min_bytes": 512}
        budget = int(share * peak_bytes)
        return torchlms.LMS(model, optimizer, budget=budget, rules=rules, disk_dir=spill_dir, device="cpu")

    found, lms = train(late, around)
    assert found == train(late)[0]
    stats = lms.stats()
    assert stats["replans"] == 0
    assert stats["strayed"] == 0
    assert any(move.choice is Choice.RECOMPUTE for move in lms.plan.moves)
    assert "recipe" not in caplog.text, "none that cannot be carried out"


def test_who_shows_a_traceback_with_its_values_is_not_kept_waiting() -> None:
    """Of sixty ops each of which reads the one before twice."""
    provenance = Provenance(
        device=torch.device("cpu"), kinds=lambda storage: None, hold=lambda tensor: None, hollow=torch.empty
    )
    tensor = torch.ones(8)
    for op in range(60):
        args = (tensor, tensor)
        call = provenance.before(torch.ops.aten.add.Tensor, args, {}, op)
        tensor = tensor + tensor
        provenance.after(call, args, {}, tensor)
    assert len(repr(call)) < 1000
