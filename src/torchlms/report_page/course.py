"""Course: one planned step, moment by moment: memory by what it is for, and what each queue does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from torchlms.core.curve import occupancy, ring_occupancy
from torchlms.core.drops import with_drops
from torchlms.core.plan import Choice
from torchlms.core.simulate import Simulator
from torchlms.core.tape import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchlms.core.curve import Bytes, Seconds
    from torchlms.core.plan import Decision
    from torchlms.core.simulate import Timeline
    from torchlms.core.tape import Tape, Value
    from torchlms.report_page.record import RunRecord

# Bottom to top. What stays for the whole step lies below what comes and goes.
LAYERS = ("resident", "parameters and states", "kept", "moving", "made again", "at work", "workspace")

_LASTING = (Kind.PARAMETER, Kind.BUFFER, Kind.GRADIENT, Kind.STATE)


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """``layers_bytes`` by name, one entry per op; together they are the predicted curve of memory."""

    tape: Tape
    timeline: Timeline
    layers_bytes: dict[str, Bytes]

    @property
    def memory_bytes(self) -> Bytes:
        total: Bytes = sum(self.layers_bytes.values(), np.zeros(len(self.tape.ops), dtype=np.int64))
        return total

    @property
    def stalls_s(self) -> list[tuple[float, float]]:
        """Begin and end of each wait of the compute queue that can be seen."""
        ends_s: Seconds = np.concatenate(([0.0], self.timeline.end_s[:-1]))
        gaps = zip(ends_s.tolist(), self.timeline.start_s.tolist(), strict=True)
        return [(end, start) for end, start in gaps if start - end > 1e-6]


def course_of(record: RunRecord) -> Course:
    """The step as the plan would have it, with the op times that were measured."""
    decisions = {move.value: move for move in record.plan.moves}
    drops = [
        record.tape.values[value] for value, move in decisions.items() if move.choice is Choice.RECOMPUTE
    ]
    moves = [move for move in decisions.values() if move.choice in (Choice.HOST, Choice.DISK)]
    tape = with_drops(record.tape, drops)
    timeline = Simulator(tape, record.machine).run(moves)
    return Course(
        tape, timeline, _layers(tape, moves, {value.id for value in drops}, len(record.tape.values))
    )


def _layers(tape: Tape, moves: list[Decision], dropped: set[int], known: int) -> dict[str, Bytes]:
    count = len(tape.ops)
    moving = {move.value for move in moves}
    groups: dict[str, list[Value]] = {name: [] for name in LAYERS}
    for value in tape.values:
        groups[_layer_of(value, moving, dropped, known)].append(value)
    layers = {name: _live(group, count) for name, group in groups.items()}
    layers["moving"] = layers["moving"] - ring_occupancy(
        count,
        [move.release_op for move in moves],
        [move.reload_op for move in moves],
        [tape.values[move.value].size_bytes for move in moves],
    )
    layers["resident"] = layers["resident"] + tape.resident_bytes
    layers["workspace"] = np.array([op.scratch_bytes for op in tape.ops], dtype=np.int64)
    return layers


def _layer_of(value: Value, moving: set[int], dropped: set[int], known: int) -> str:
    if value.kind in _LASTING:
        return "parameters and states"
    if value.id in moving:
        return "moving"
    if value.id in dropped or value.id >= known:  # before it is dropped, and after it is made again
        return "made again"
    return "kept" if value.saved >= 0 else "at work"


def _live(values: Iterable[Value], count: int) -> Bytes:
    chosen = list(values)
    return occupancy(
        count,
        [max(value.birth, 0) for value in chosen],
        [value.death + 1 for value in chosen],
        [value.size_bytes for value in chosen],
    )


def speeds(record: RunRecord, shares: Iterable[float]) -> list[tuple[int, float]]:
    """Device budgets, as shares of what plain needs, each with its share of the plain speed; 0: no plan."""
    from torchlms.fit.outlook import look, plain_peak_bytes

    plain_bytes = plain_peak_bytes(record.tape)
    found = []
    for share in shares:
        budget = replace(record.plan.budget, device_bytes=int(share * plain_bytes))
        found.append((budget.device_bytes, look(record.tape, record.machine, budget).speed))
    return found
