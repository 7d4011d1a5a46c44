"""Bands: the memory of a step apart by what it is and what was chosen for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torchlms.core.curve import occupancy, ring_occupancy
from torchlms.core.plan import Choice
from torchlms.core.tape import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchlms.core.curve import Bytes
    from torchlms.core.plan import Decision
    from torchlms.core.tape import Value
    from torchlms.report_page.step import Step

_KEPT = {
    Kind.PARAMETER: "parameters",
    Kind.BUFFER: "buffers",
    Kind.GRADIENT: "gradients",
    Kind.STATE: "optimizer states",
    Kind.INPUT: "inputs",
    Kind.OTHER: "other values",
    Kind.ACTIVATION: "activations and interim results that stay",
}
_LEAVES = {
    Choice.HOST: "moves to host memory",
    Choice.DISK: "moves to disk",
    Choice.RECOMPUTE: "dropped and made again",
}


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """One layer of the stack: ``size_bytes`` has one entry per op. ``key`` names its colour."""

    key: str
    name: str
    size_bytes: Bytes


def memory_bands(step: Step) -> tuple[Band, ...]:
    """Bottom first. They add up to the simulator's curve; layers without a byte are left out."""
    count = len(step.tape.ops)
    choices = step.choices
    bands = [Band("rest", "not told apart", np.full(count, step.tape.resident_bytes, dtype=np.int64))]
    for kind, name in _KEPT.items():
        values = [value for value in step.tape.values if value.kind is kind and value.id not in choices]
        bands.append(Band(kind.value, name, _present(count, values)))
    for choice, name in _LEAVES.items():
        values = [value for value in step.tape.values if choices.get(value.id) is choice]
        # Colours are of values: one that leaves twice may do so by different choices.
        away = _away(step, [move for move in step.moves if choices[move.value] is choice])
        bands.append(Band(choice.value, name, _present(count, values) - away))
    scratch = np.array([op.scratch_bytes for op in step.tape.ops], dtype=np.int64)
    bands.append(Band("scratch", "workspace of the op", scratch))
    return tuple(band for band in bands if band.size_bytes.any())


def away_bands(step: Step) -> tuple[Band, ...]:
    """What is not on the device at each op, by where it is."""
    decisions = (*step.moves, *step.drops)
    found = [
        Band(choice.value, name, _away(step, [move for move in decisions if move.choice is choice]))
        for choice, name in _AWAY.items()
    ]
    return tuple(band for band in found if band.size_bytes.any())


_AWAY = {
    Choice.HOST: "in host memory",
    Choice.DISK: "on disk",
    Choice.RECOMPUTE: "nowhere: to be made again",
}


def _present(count: int, values: Iterable[Value]) -> Bytes:
    """Bytes at each op as if nothing left."""
    values = list(values)
    return occupancy(
        count,
        [max(value.birth, 0) for value in values],
        [value.death + 1 for value in values],
        [value.size_bytes for value in values],
    )


def _away(step: Step, decisions: Sequence[Decision]) -> Bytes:
    return ring_occupancy(
        len(step.tape.ops),
        [move.release_op for move in decisions],
        [move.reload_op for move in decisions],
        [step.recorded.values[move.value].size_bytes for move in decisions],
    )
