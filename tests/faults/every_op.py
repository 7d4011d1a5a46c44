"""Every op: out of memory at each op of two steps, whether forward, backward or in the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from faults.injection import OPS, Fault
from faults.trial import NETWORK, Found, budget_bytes, expected, try_fault
from small_networks import Perceptron
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchlms.eager import private

STEPS = 2  # one recorded, one under the first plan
KIND = "out of memory in an op"
SHORT = replace(NETWORK, name="every op", make_model=partial(Perceptron, layers=2), batch_size=256)


@dataclass(frozen=True)
class Struck:
    """What came of a fault, and what it struck: in words by which a table gathers them."""

    where: str
    found: Found


def strike_every(
    stride: int, spill_dir: Path, *, snapshot: bool, recompute: bool, first: int = 0
) -> Iterator[Struck]:
    """Each ``stride``-th op from ``first`` on fails once, in a run of its own."""
    phases = phases_of_ops(spill_dir, snapshot=snapshot, recompute=recompute)
    for moment in range(first, len(phases), stride):
        fault = Fault(KIND, moment)
        found = try_fault(
            fault, spill_dir, snapshot=snapshot, recompute=recompute, network=SHORT, steps=STEPS
        )
        yield Struck(phases[moment], found)


@cache
def phases_of_ops(spill_dir: Path, *, snapshot: bool, recompute: bool) -> list[str]:
    """In which phase each op of a run without faults runs, ours among them: the same up to any fault."""
    budget_bytes(SHORT, STEPS), expected(SHORT, STEPS)  # plain runs of their own, which come once
    phases: list[str] = []
    updating = False

    def turn(on: bool) -> Callable[..., None]:
        def note(*_: Any) -> None:
            nonlocal updating
            updating = on

        return note

    target, name = OPS
    right = getattr(target, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        phases.append("optimizer" if updating else "backward" if private.in_backward() else "forward")
        return right(*args, **kwargs)

    hooks = [  # of all optimizers
        register_optimizer_step_pre_hook(turn(True)),
        register_optimizer_step_post_hook(turn(False)),
    ]
    try:
        never = Fault(KIND, -1)
        with patch.object(target, name, noting):
            found = try_fault(
                never, spill_dir, snapshot=snapshot, recompute=recompute, network=SHORT, steps=STEPS
            )
    finally:
        for hook in hooks:
            hook.remove()
    assert not found.wrong, found.wrong
    return phases
