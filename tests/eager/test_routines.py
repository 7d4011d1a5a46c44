"""Routines: which kinds of step are recorded, and which are not worth it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import SMALL
from torch import nn

import torchlms


def test_shapes_that_never_come_again_are_not_recorded_for_ever(
    spill_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(lms: bool) -> tuple[list[str], int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options: dict[str, Any] = {"budget": "400KiB", "disk_dir": spill_dir, "rules": SMALL}
        losses, recorded = [], 0
        with torchlms.LMS(model, optimizer, **options) if lms else nullcontext() as entered:
            for rows in (*range(100, 190), *[300] * 6):  # and then comes what stays
                loss = model(torch.randn(rows, 32)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()).hex())
            if entered is not None:
                assert entered.state == "guard", "what comes again is recorded and planned for"
                recorded = sum("recording step" in record.getMessage() for record in caplog.records)
        return losses, recorded

    plain, _ = train(lms=False)
    losses, recorded = train(lms=True)
    assert losses == plain
    assert 64 <= recorded <= 67, "as many as are remembered, as many that were forgotten, and the last"
    assert sum("came and went without coming again" in record.getMessage() for record in caplog.records) == 1
