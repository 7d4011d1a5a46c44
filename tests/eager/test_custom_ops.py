"""Ops of somebody's own that write their arguments: torch counts the write before the op runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sessions import slow_disk
from torch import Tensor
from traps import STEPS, Trap, assert_same, batch, train

import torchlms
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


Write = Callable[[Tensor], None]


WRITES: dict[str, Write] = {
    "one": lambda shift: shift_by(shift, 0.25),
    "a list": lambda shift: shift_all([shift], 0.25),
    "the same twice": lambda shift: shift_all([shift, shift], 0.25),
    "two views": lambda shift: shift_all([shift[:32], shift[32:]], 0.25),
    "detached": lambda shift: shift_by(shift.detach(), 0.25),
    "through data": lambda shift: shift_by(shift.data, 0.25),
    "data and itself": lambda shift: shift_all([shift.data, shift], 0.25),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_source_that_such_an_op_writes_before_backward(write: Write, spill_dir: Path) -> None:
    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        with torch.no_grad():
            write(model.shift)  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach()).hex()

    stats = assert_same(lambda model, x: F.relu(F.silu(x) + model.shift), spill_dir, loop)
    assert stats["replayed_ops"]


def test_a_write_through_data_that_has_counted_as_much(spill_dir: Path) -> None:
    """Versions alone do not tell whose counter that is."""

    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        shift: Tensor = model.shift  # type: ignore[assignment]
        for _ in range(2):
            shift.add_(0.0)
        data = shift.data
        while data._version < shift._version - 1:
            data.add_(0.0)
        loss = F.cross_entropy(model(x), y)
        shift_by(data, 0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach()).hex()

    stats = assert_same(lambda model, x: F.relu(F.silu(x) + model.shift), spill_dir, loop)
    assert stats["replayed_ops"]


def test_a_write_that_lms_did_not_see_is_not_taken_for_the_one_that_comes(spill_dir: Path) -> None:
    """From another thread; then such an op writes what is counted elsewhere."""

    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        shift: Tensor = model.shift  # type: ignore[assignment]
        if step == STEPS - 1:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: shift.add_(0.5)).result()
            with pytest.raises(torchlms.ReplayFailed, match="unseen by LMS"):
                shift_by(shift.data, 0.25)
            return "refused"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach()).hex()

    losses, _, _ = train(lambda model, x: F.relu(F.silu(x) + model.shift), spill_dir, loop)
    assert losses[-1] == "refused"
