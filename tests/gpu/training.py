"""A loop that is tried plainly, again and again, and then under LMS: the same bits where plain repeats its
own, and else within the spread of the plain runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import torchlms
from tests.gpu.networks import GIB, clean

DEVICE = "cuda"
STEPS = 7  # recorded, timed twice, settled, and some more
PLAIN_RUNS = 5
# A rule moves every value, whatever the budget: these networks are small.
ALL_MOVE: dict[str, Any] = {
    "budget": 4 * GIB,
    "rules": {"min_bytes": 512, "move_ops": ["*"], "recompute": False},
}


@dataclass(frozen=True)
class Job:
    """A model, its optimizer, and one step, which returns the loss."""

    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    step: Callable[[nn.Module, torch.optim.Optimizer, int], Tensor]


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    state: dict[str, Tensor]

    def same_as(self, other: Trained) -> bool:
        return self.losses == other.losses and all(
            torch.equal(item, other.state[name]) for name, item in self.state.items()
        )


def fresh(job: Job) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = job.make_model().to(DEVICE)
    return model, job.make_optimizer(model)


def train(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> Trained:
    """Data and dropout from one seed."""
    torch.manual_seed(2)
    losses = [job.step(model, optimizer, number).item() for number in range(steps)]
    return Trained(losses, {name: item.detach().cpu().clone() for name, item in model.state_dict().items()})


def plain_runs(job: Job, steps: int = STEPS) -> list[Trained]:
    """The same training several times: does it repeat its bits, and how far off is it if not?"""
    found = []
    for _ in range(PLAIN_RUNS):
        model, optimizer = fresh(job)
        found.append(train(job, model, optimizer, steps))
        del model, optimizer
        clean()
    return found


def assert_as_plain(job: Job, steps: int = STEPS, **options: Any) -> dict[str, Any]:
    """Train under LMS, compare, and return its stats."""
    plain = plain_runs(job, steps)
    model, optimizer = fresh(job)
    with torchlms.LMS(model, optimizer, **options) as lms:
        ours = train(job, model, optimizer, steps)
        stats = dict(lms.stats())
    compare(ours, plain)
    assert stats["bytes_out_per_step"] > 0 or stats["replayed_ops"] > 0, "nothing moved, so nothing was shown"
    return stats


def compare(ours: Trained, plain: list[Trained]) -> None:
    """The same bits, or where plain runs differ among themselves, no further off than they are."""
    if all(left.same_as(right) for left, right in pairwise(plain)):
        assert ours.losses == plain[0].losses
        assert ours.same_as(plain[0])
        return
    spread = 0.0
    for number, loss in enumerate(ours.losses):
        known = [run.losses[number] for run in plain]
        spread = max(spread, max(known) - min(known))
        assert min(known) - spread <= loss <= max(known) + spread, f"step {number}: {loss}, plain {known}"
