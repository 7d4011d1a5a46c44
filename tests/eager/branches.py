"""Branches: a network whose backward passes may come in any order, and a loop that draws one for a step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sessions import Session
from small_networks import NETWORKS, Network
from torch import Tensor, nn

WIDTH = 32
BRANCHES = 5


class Branches(nn.Module):
    """A trunk, and branches behind it that know nothing of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH),
                nn.Sigmoid(),
                nn.Dropout(0.2),
                nn.Linear(WIDTH, WIDTH),
                nn.GELU(),
                nn.Linear(WIDTH, 10),
            )
            for _ in range(BRANCHES)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.trunk(x)
        return [branch(x) for branch in self.branches]


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


NETWORK = Network("branches", Branches, _adamw, NETWORKS["mlp"].make_inputs, 256)


def shuffled(seed: int) -> Callable[[Session, int], None]:
    """Steps in which the branches go backward one or two at a time, each step in an order of its own: by
    ``backward``, by ``autograd.grad``, or to their own parameters first."""

    def step(session: Session, number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        inputs, target = session.network.batch(number)
        session.optimizer.zero_grad()
        losses = [F.cross_entropy(out, target) for out in session.model(inputs)]
        parts = list(_parts(draw))
        for place, part in enumerate(parts):
            loss = torch.stack([losses[branch] for branch in part]).sum()
            _go_back(draw, session.model, part, loss, retain=place < len(parts) - 1)
        session.optimizer.step()
        for loss in losses:
            session.note(loss)

    return step


def _parts(draw: random.Random) -> Iterator[list[int]]:
    order = draw.sample(range(BRANCHES), BRANCHES)
    while order:
        size = draw.choice((1, 2))
        yield order[:size]
        order = order[size:]


def _go_back(draw: random.Random, model: nn.Module, part: list[int], loss: Tensor, *, retain: bool) -> None:
    parameters = list(model.parameters())
    branches, trunk = model.get_submodule("branches"), model.get_submodule("trunk")
    own = [item for branch in part for item in branches.get_submodule(str(branch)).parameters()]
    how = draw.choice(("backward", "grad", "own first", "twice"))
    if how == "backward":
        loss.backward(retain_graph=retain)
    elif how == "grad":
        found = torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)
        for item, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                item.grad = gradient if item.grad is None else item.grad + gradient
    elif how == "own first":
        loss.backward(inputs=own, retain_graph=True)
        loss.backward(inputs=list(trunk.parameters()), retain_graph=retain)
    else:  # looked at, and thrown away
        torch.autograd.grad(loss, own[-1:], retain_graph=True)
        loss.backward(retain_graph=retain)
