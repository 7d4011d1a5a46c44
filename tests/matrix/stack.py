"""A network that is the same for many rows but for what stands between its layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from small_networks import NETWORKS, Network, Perceptron
from torch import Tensor, nn

WIDTH = 32
ROWS = 256  # a batch; each value of the network is then 32 KiB


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Stack(nn.Module):
    """Layers with ``make_middle()`` after each; it is given ROWS x WIDTH and returns as much."""

    def __init__(self, make_middle: Callable[[], nn.Module], blocks: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), make_middle()) for _ in range(blocks)
        )
        self.leave = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def learning(
    name: str,
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    **more: Any,
) -> Network:
    """A network that learns classes of random rows."""
    return Network(name, make_model, make_optimizer, NETWORKS["mlp"].make_inputs, ROWS, **more)


def stack(name: str, make_middle: Callable[[], nn.Module], blocks: int = 4) -> Network:
    return learning(name, partial(Stack, make_middle, blocks))


PERCEPTRON = learning("perceptron", partial(Perceptron, WIDTH, 6))


def stack_of(function: Callable[[Tensor], Tensor]) -> Network:
    return stack(function.__name__, partial(Applied, function))
