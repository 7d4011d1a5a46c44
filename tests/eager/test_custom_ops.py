"""Ops of somebody's own that write their arguments: torch counts the write before the op runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sessions import slow_disk
from torch import Tensor
from traps import Trap, assert_same, batch

from torchlms.eager.private import counts_writes_first


@pytest.fixture(autouse=True)
def moving_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_disk(monkeypatch)


@torch.library.custom_op("torchlms_tests::shift_by", mutates_args=("target",))
def shift_by(target: Tensor, amount: float) -> None:
    target.add_(amount)


@torch.library.custom_op("torchlms_tests::shift_all", mutates_args=("targets",))
def shift_all(targets: list[Tensor], amount: float) -> None:
    for target in targets:
        target.add_(amount)


def test_whether_a_write_is_counted_before_or_after_the_op() -> None:
    """What the write barrier assumes of torch."""
    assert counts_writes_first(torch.ops.torchlms_tests.shift_by.default)
    assert not counts_writes_first(torch.ops.aten.add_.Tensor)


@pytest.mark.parametrize("several", [False, True])
def test_a_source_that_such_an_op_writes_before_backward(several: bool, spill_dir: Path) -> None:
    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        with torch.no_grad():
            shift: Tensor = model.shift  # type: ignore[assignment]
            shift_all([shift], 0.25) if several else shift_by(shift, 0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach()).hex()

    stats = assert_same(lambda model, x: F.relu(F.silu(x) + model.shift), spill_dir, loop)
    assert stats["replayed_ops"]
