"""Optimizers on a device: one kernel for all parameters, and a scaler that skips a step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gpu.networks import convnet
from tests.gpu.training import ALL_MOVE, DEVICE, Job, assert_as_plain, fresh, train

pytestmark = pytest.mark.gpu
SHAPE = (16, 3, 48, 48)
SKIPPED = 3


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(*SHAPE, device=DEVICE), torch.randint(0, 10, SHAPE[:1], device=DEVICE)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    del number
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def test_fused_adamw() -> None:
    assert_as_plain(Job(convnet, fused, step), **ALL_MOVE)


class Scaled:
    """float16 with a scaler of its own for each run; one step has a bad batch, and is skipped."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
        self.skipped: list[int] = []

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
        if number == 0:
            self.__init__()  # type: ignore[misc]
        x, y = batch()
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = F.cross_entropy(model(x).float(), y)
        bad = loss * float("inf") if number == SKIPPED else loss
        self.scaler.scale(bad).backward()
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < before:
            self.skipped.append(number)
        return loss


@pytest.mark.parametrize(
    "make_optimizer", [fused, lambda model: torch.optim.SGD(model.parameters(), lr=0.01)]
)
def test_a_scaler_with_a_skipped_step(make_optimizer: object) -> None:
    scaled = Scaled()
    job = Job(convnet, make_optimizer, scaled)  # type: ignore[arg-type]
    model, optimizer = fresh(job)
    train(job, model, optimizer)
    assert scaled.skipped == [SKIPPED]
    del model, optimizer
    assert_as_plain(job, **ALL_MOVE)
    assert scaled.skipped == [SKIPPED]
