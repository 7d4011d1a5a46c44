"""Every plan of a small tape, tried one by one."""

from __future__ import annotations

from itertools import combinations, product
from typing import TYPE_CHECKING

import numpy as np

from torchlms.core.curve import memory_curve
from torchlms.core.plan import Choice, Decision
from torchlms.core.simulate import Simulator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchlms.core.machine import Machine
    from torchlms.core.tape import Tape, Value


def best_step_s(tape: Tape, machine: Machine, limit_bytes: int, choice: Choice = Choice.HOST) -> float | None:
    """The shortest step over all subsets of moves and all pairs of release and reload; None if none fits."""
    simulator = Simulator(tape, machine)
    best = None
    for chosen in product(*(list(_options(value, choice)) for value in tape.values)):
        decisions = [decision for decision in chosen if decision is not None]
        if np.max(memory_curve(tape, decisions, baseline=simulator.baseline)) <= limit_bytes:
            step_s = float(simulator.moments_s[-1]) + simulator.stall_s(decisions)
            best = step_s if best is None else min(best, step_s)
    return best


def _options(value: Value, choice: Choice) -> Iterator[Decision | None]:
    yield None
    for index, stretch in enumerate(value.idle if value.movable else ()):
        for release, reload in combinations(range(stretch.start, stretch.stop + 1), 2):
            yield Decision(value.id, index, choice, release, reload)
