"""Traps: a network wide enough to be worth dropping, with one thing in the middle that could go wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sessions import DROPPING
from torch import Tensor, nn

import torchlms
from torchlms.core.plan import Choice, Plan
from torchlms.core.tape import Tape

STEPS = 8


class Trap(nn.Module):
    """``middle`` between two layers wide enough to be worth dropping."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 64)
        self.inner = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.leave = nn.Linear(64, 4)
        self.register_buffer("shift", torch.linspace(-1, 1, 64))
        self.scale = nn.Parameter(torch.ones(64))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.inner:
            x = layer(self.middle(self, x))
        return self.leave(x)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(512, 16, generator=generator), torch.randint(0, 4, (512,), generator=generator)


Loop = Callable[[Trap, torch.optim.Optimizer, int], str]


def usual(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
    x, y = batch(step)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach()).hex()


def writing(when: Callable[[int], bool]) -> Loop:
    """The usual step, with a buffer written before backward in the steps for which ``when`` is true."""

    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        if when(step):
            with torch.no_grad():
                model.shift.add_(0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach()).hex()

    return loop


def train(
    middle: Callable[[nn.Module, Tensor], Tensor],
    spill_dir: Path | None,
    loop: Loop = usual,
    budget_bytes: int = 1_500_000,
    **options: Any,
) -> tuple[list[str], list[Tensor], dict[str, object]]:
    torch.manual_seed(3)
    model = Trap(middle)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if spill_dir is None:
        losses = [loop(model, optimizer, step) for step in range(STEPS)]
        stats: dict[str, object] = {}
    else:
        given = {"budget": budget_bytes, "disk_dir": spill_dir, "rules": DROPPING, **options}
        with torchlms.LMS(model, optimizer, **given) as lms:
            losses = [loop(model, optimizer, step) for step in range(STEPS)]
            stats = {**lms.stats(), "plan made": lms.plan, "tape": lms.tape}
    return losses, [item.detach().clone() for item in model.state_dict().values()], stats


def assert_same(
    middle: Callable[[nn.Module, Tensor], Tensor],
    spill_dir: Path,
    loop: Loop = usual,
    budget_bytes: int = 1_500_000,
    **options: Any,
) -> dict[str, object]:
    plain_losses, plain_state, _ = train(middle, None, loop)
    losses, state, stats = train(middle, spill_dir, loop, budget_bytes, **options)
    assert losses == plain_losses
    assert all(torch.equal(left, right) for left, right in zip(state, plain_state, strict=True))
    return stats


def replayed_names(plan: Plan, tape: Tape) -> set[str]:
    recipes = [tape.values[move.value].recipe for move in plan.moves if move.choice is Choice.RECOMPUTE]
    return {tape.ops[op].name for recipe in recipes for op in recipe}
