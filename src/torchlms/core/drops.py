"""Drops: a tape as it would be if some values were let go and made again when they are needed.

A dropped value is two on the new tape: itself until its idle stretch begins, and another, at the end of
the list, from where the stretch ends. There its op takes longer by the recipe, needs the recipe's
intermediate results, and the sources must be present: a source's own idle stretch ends there at the
latest, and it lives until then at least.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torchlms.core.curve import floor_curve, wraps
from torchlms.core.tape import Stretch, Tape, Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def droppable(tape: Tape, value: Value) -> bool:
    """Whether ``value`` has a recipe, and one idle stretch to be away in."""
    return (
        value.movable
        and bool(value.recipe)
        and len(value.idle) == 1
        and not wraps(value.idle[0])
        and value.idle[0].stop < len(tape.ops)
    )


def replay_s(tape: Tape, value: Value) -> float:
    """Seconds that making ``value`` again takes."""
    return sum(tape.ops[op].time_s for op in value.recipe)


def independent(tape: Tape, ranked: Iterable[Value]) -> list[Value]:
    """Of ``ranked``, best first, those none of which is made from another."""
    chosen: list[Value] = []
    dropped: set[int] = set()
    sources: set[int] = set()
    for value in ranked:
        if value.id not in sources and dropped.isdisjoint(value.sources):
            chosen.append(value)
            dropped.add(value.id)
            sources.update(value.sources)
    return chosen


def feasible(tape: Tape, ranked: Sequence[Value], limit_bytes: int) -> list[Value]:
    """Of ``ranked``, those that can all be dropped and leave no op above ``limit_bytes`` for certain.

    What is made again needs its sources and intermediate results at one moment, which a tight op may
    have no room for: whatever is made again about there is not dropped.
    """
    chosen = list(ranked)
    while chosen:
        floor = floor_curve(with_drops(tape, chosen))
        worst = int(floor.argmax())
        if floor[worst] <= limit_bytes:
            return chosen
        rest = [value for value in chosen if not _present(tape, value, worst)]
        if len(rest) == len(chosen):
            return []  # it is too much without any drops
        chosen = rest
    return chosen


def _present(tape: Tape, dropped: Value, op: int) -> bool:
    """Whether making ``dropped`` again has something on the device during ``op`` that need not be there."""
    stop = dropped.idle[0].stop
    needs = (stretch.stop for source in dropped.sources for stretch in tape.values[source].idle)
    return stop <= op <= max((stop, *needs))


def with_drops(tape: Tape, drops: Sequence[Value]) -> Tape:
    """``tape`` if ``drops`` were dropped. The values keep their ids; what comes back gets new ones."""
    ops, values = list(tape.ops), list(tape.values)
    births: dict[int, list[Value]] = {}
    for value in tape.values:
        births.setdefault(value.birth, []).append(value)
    for dropped in drops:
        start, stop = dropped.idle[0].start, dropped.idle[0].stop
        first = replace(values[dropped.id], death=max(start - 1, dropped.birth, 0), idle=(), movable=False)
        values[dropped.id] = first
        again = replace(dropped, id=len(values), birth=stop, idle=(), movable=False, saved=-1, saved_at=-1)
        values.append(again)
        between_bytes = sum(
            value.size_bytes
            for op in dropped.recipe
            for value in births.get(op, ())
            if value.id != dropped.id
        )
        ops[stop] = replace(
            ops[stop],
            time_s=ops[stop].time_s + replay_s(tape, dropped),
            scratch_bytes=max(ops[stop].scratch_bytes, between_bytes),
        )
        for source in dropped.sources:
            values[source] = _present_at(values[source], stop)
    return replace(tape, ops=tuple(ops), values=tuple(values))


def _present_at(source: Value, op: int) -> Value:
    """The source, on the device at ``op``."""
    idle = tuple(
        Stretch(stretch.start, op) if stretch.start < op < stretch.stop else stretch
        for stretch in source.idle
        if not (stretch.start >= op and not wraps(stretch))
    )
    return replace(source, idle=idle, movable=source.movable and bool(idle), death=max(source.death, op))
