"""Batches in memory that never moves, as numpy and the workers of a DataLoader give them, begin a step."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sessions import SMALL
from torch import Tensor, nn

import torchlms

STEPS = 6


def batch(step: int, rows: int) -> tuple[Tensor, Tensor]:
    numbers = np.random.default_rng(step)
    inputs = torch.from_numpy(numbers.standard_normal((rows, 3, 16, 16), dtype=np.float32))
    assert not inputs.untyped_storage().resizable()
    return inputs, torch.from_numpy(numbers.integers(0, 4, rows))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 14 * 14, 4),
    )  # fmt: skip


def train(
    spill_dir: Path | None, *, rows: int = 16, passes: int = 1, last: int = 16
) -> tuple[list[str], dict[str, Any]]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"budget": "560KiB", "disk_dir": spill_dir, "rules": SMALL}
    losses, stats = [], {}
    with torchlms.LMS(model, optimizer, **options) if spill_dir else contextlib.nullcontext() as lms:
        for step in range(STEPS):
            for part in range(passes):
                x, y = batch(step * passes + part, last if step == STEPS - 1 else rows)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                losses.append(float(loss.detach()).hex())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model(x)
        if lms is not None:
            assert lms._engine is not None
            stats = {**lms.stats(), "tape": lms.tape, "routines": len(list(lms._engine.routines))}
    return losses, stats


@pytest.mark.parametrize("passes", [1, 2])
def test_the_first_layer_is_where_the_tape_begins(passes: int, spill_dir: Path) -> None:
    plain, _ = train(None, passes=passes)
    losses, stats = train(spill_dir, passes=passes)
    assert losses == plain
    assert [(op.name, op.module) for op in stats["tape"].ops[:1]] == [("aten.convolution.default", "0")]
    assert stats["bytes_out_per_step"] > 0
    assert stats["steps"] == STEPS * passes
    assert stats["strayed"] == 0


def test_a_smaller_last_batch_is_a_step_of_its_own(spill_dir: Path) -> None:
    plain, _ = train(None, last=8)
    losses, stats = train(spill_dir, last=8)
    assert losses == plain
    assert stats["strayed"] == 0
    assert stats["routines"] == 2


def test_where_nothing_else_is_saved_each_step_is_one_all_the_same(spill_dir: Path) -> None:
    layer = nn.Linear(128, 1)
    with torchlms.LMS(layer, budget="1MiB", disk_dir=spill_dir, rules=SMALL) as lms:
        for step in range(STEPS):
            inputs = torch.from_numpy(np.full((4, 128), step, dtype=np.float32))
            layer(inputs).sum().backward()
        assert lms.stats()["steps"] == STEPS
        assert lms._engine is not None
        recorder = lms._engine.now.recorder
        assert recorder is None or len(recorder._ops) < 50


def test_read_twice_it_does_not_begin_anew_in_another_layer(spill_dir: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(128, 256), nn.Linear(128, 256)

        def forward(self, x: Tensor) -> Tensor:
            return (self.left(x).sin() * self.right(x).cos()).square()

    model = Branches()
    with torchlms.LMS(model, budget="1MiB", disk_dir=spill_dir, rules=SMALL) as lms:
        for _ in range(STEPS):
            model(torch.from_numpy(np.ones((64, 128), dtype=np.float32))).sum().backward()
        assert lms.stats()["steps"] == STEPS
        assert lms.tape is not None
        assert [op.module for op in lms.tape.ops if op.name == "aten.addmm.default"] == ["left", "right"]


def test_two_inputs_alike_in_one_module_begin_one_step(spill_dir: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Parameter(torch.ones(128, 256)) for _ in range(2))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return ((x @ self.left).sin() * (y @ self.right).cos()).square()

    model = Both()
    with torchlms.LMS(model, budget="1MiB", disk_dir=spill_dir, rules=SMALL) as lms:
        for step in range(STEPS):
            x, y = (torch.from_numpy(np.full((64, 128), step, dtype=np.float32)) for _ in range(2))
            model(x, y).sum().backward()
        assert lms.stats()["steps"] == STEPS
        assert lms.tape is not None
        assert [op.name for op in lms.tape.ops].count("aten.mm.default") == 4


def test_an_input_that_functions_of_one_module_read_begins_one_step(spill_dir: Path) -> None:
    """It is saved again and again, before anything else is."""
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
    with torchlms.LMS(layers, budget="1MiB", disk_dir=spill_dir, rules=SMALL) as lms:
        for step in range(STEPS):
            x = torch.from_numpy(np.full((64, 64), step, dtype=np.float32))
            sums = [F.linear(x, layer.weight, layer.bias) for layer in layers]  # type: ignore[arg-type]
            torch.stack(sums).tanh().square().sum().backward()
        assert lms.stats()["steps"] == STEPS


def test_a_forward_pass_that_is_given_up_is_a_step_of_its_own(spill_dir: Path) -> None:
    model = network()
    with torchlms.LMS(model, budget="1MiB", disk_dir=spill_dir, rules=SMALL) as lms:
        for step in range(STEPS):
            model(batch(step, 16)[0])
            model(batch(step, 16)[0]).sum().backward()
        assert lms.stats()["steps"] == 2 * STEPS
        assert lms.stats()["strayed"] == 0
