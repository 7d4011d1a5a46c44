"""Passes: some forward and backward passes of a case, and all that they leave as exact bits."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import torchlms
from borrowed.case import SEED, Subject, named_tensors, seed
from borrowed.force import Force, away, evict, forced_on

STEPS = 4  # recorded; twice under the first plan, timed; under the plan that stays
_EVICTED = (0, STEPS - 1)  # steps in which all that may leaves before the backward pass


@dataclass(frozen=True, slots=True)
class Run:
    """Bits by name, and the error that ended the run, if one did. ``smallest_bytes``: the budget that LMS
    asked for when it refused."""

    bits: dict[str, str]
    error: str = ""
    refused: bool = False
    smallest_bytes: int = 0
    away: int = 0
    planned: int = 0


def run(make: Callable[[], Subject], force: Force | None = None) -> Run:
    """``STEPS`` passes over a fresh subject, under LMS if ``force`` says how. An error ends them, and is
    part of what is found."""
    seed()
    subject = make()
    found: dict[str, str] = {}
    most_away = 0
    with ExitStack() as stack:
        lms: torchlms.LMS | None = None
        if force is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchlms-suites-")))
            lms = stack.enter_context(forced_on(force, subject.model, folder))

        def between(step: int) -> None:
            nonlocal most_away
            if lms is None or force is None:
                return
            if force.everything and step in _EVICTED:
                evict(lms)
            most_away = max(most_away, away(lms))

        ended = _steps(subject, found, between)
        planned = len(lms.plan.moves) if lms is not None and lms.plan is not None else 0
    return replace(ended, away=most_away, planned=planned)


def _steps(subject: Subject, found: dict[str, str], between: Callable[[int], None]) -> Run:
    try:
        for step in range(STEPS):
            _step(subject, step, found, between)
    except torchlms.BudgetTooSmall as error:
        return Run(found, _first_line(error), refused=True, smallest_bytes=error.smallest_bytes)
    except torchlms.LMSError as error:
        return Run(found, _first_line(error), refused=True)
    except Exception as error:
        return Run(found, _first_line(error))
    return Run(found)


def _step(subject: Subject, step: int, found: dict[str, str], between: Callable[[int], None]) -> None:
    torch.default_generator.manual_seed(SEED + step)
    for leaf in subject.leaves.values():
        leaf.grad = None
    edges, gradients = _forward(subject, f"step {step}", found)
    between(step)
    if edges:
        torch.autograd.backward(edges, gradients)
    for name, leaf in subject.leaves.items():
        found[f"step {step}: {name}"] = bits(leaf)
        found[f"step {step}: gradient of {name}"] = "none" if leaf.grad is None else bits(leaf.grad)
    found.update({f"step {step}: {name}": bits(tensor) for name, tensor in subject.watched.items()})
    found[f"step {step}: generator"] = bits(torch.get_rng_state())
    subject.after()


def _forward(
    subject: Subject, step: str, found: dict[str, str]
) -> tuple[list[torch.autograd.graph.GradientEdge], list[Tensor]]:
    """Where to go backward from, and with which gradients. The results themselves are let go of, so that
    those which autograd saved may leave."""
    results = dict(named_tensors(subject.forward()))
    found.update({f"{step}: result {name}": bits(tensor) for name, tensor in results.items()})
    ends = [tensor for tensor in results.values() if tensor.requires_grad]
    return [torch.autograd.graph.get_gradient_edge(tensor) for tensor in ends], list(map(_gradient, ends))


def _gradient(result: Tensor) -> Tensor:
    """Something to go backward with, the same in every run."""
    if result.layout is not torch.strided:
        return torch.ones_like(result)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(result.shape, dtype=result.dtype, generator=generator)


def bits(tensor: Tensor) -> str:
    """A digest of shape, type and every bit."""
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    copy = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain)  # whatever its strides, conjugate or not
    raw = copy.reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()[:16]}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
