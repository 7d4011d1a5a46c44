"""Two networks of a few GiB and one training loop, for tests that need a device with memory to spare."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

GIB = 1 << 30
MIB = 1 << 20


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + F.dropout(F.relu(self.norm(self.conv(x)), inplace=True), 0.1))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        *[Residual(64) for _ in range(8)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.1, batch_first=True)
    return nn.Sequential(
        nn.Linear(16, 512), nn.TransformerEncoder(layer, 6), nn.Flatten(), nn.Linear(512 * 256, 10)
    )


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    budget_bytes: int


# Budgets at about half of what the plain step needs.
CASES = {
    "convnet": Case(convnet, (96, 3, 96, 96), 3 * GIB),
    "transformer": Case(transformer, (64, 256, 16), 2 * GIB),
}


def make(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = case.make().cuda()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, steps: int) -> list[str]:
    """Losses as hex; data and dropout from one seed."""
    torch.manual_seed(2)
    losses = []
    for _ in range(steps):
        x = torch.randn(*case.shape, device="cuda")
        y = torch.randint(0, 10, (case.shape[0],), device="cuda")
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: item.detach().clone() for name, item in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def plain(case: Case, steps: int) -> tuple[list[str], dict[str, torch.Tensor]]:
    model, optimizer = make(case)
    losses = train(model, optimizer, case, steps)
    result = losses, state(model)
    del model, optimizer
    clean()
    return result


def planned_peak(lms: Any) -> int:
    return int(lms.stats()["peak_reserved_bytes"])
