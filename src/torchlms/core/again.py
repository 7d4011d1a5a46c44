"""Again: a tape as it would be if some values were let go and made again when they are needed.

A dropped value is two on the new tape: itself until the idle stretch begins that it is dropped in, and
another, at the end of the list, from where it is made again. There the op takes longer by the recipe,
needs room for its intermediate results, each until its last use, and the sources must be present: a
source's own idle stretch ends there at the latest, and it lives until then at least, also one that was
dropped itself and is back since long. A source that autograd did not save is kept for it alone. All that
happens before the op runs, whose results are not there yet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torchlms.core.curve import floor_curve, wraps
from torchlms.core.drops import Drops, dropped_in, dropped_while, replay_s, return_ops
from torchlms.core.tape import Stretch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchlms.core.tape import Tape, Value

GIVEN_UP = 0.25  # of what makes an op too large, at a time


def with_drops(tape: Tape, drops: Drops) -> Tape:
    """``tape`` with ``drops``. The values keep their ids; what comes back gets new ones."""
    ops, values = list(tape.ops), list(tape.values)
    births: dict[int, list[Value]] = {}
    for value in tape.values:
        births.setdefault(value.birth, []).append(value)
    returns = return_ops(drops.through)
    back: dict[int, int] = {}  # where on the list what comes back of a value is, by its id
    for dropped in drops.through:
        start, stop = dropped_while(dropped).start, returns[dropped.id]
        before = dropped.idle[: dropped_in(dropped)]
        death = max(start - 1, dropped.birth, 0)
        first = replace(values[dropped.id], death=death, idle=before, movable=bool(before))
        values[dropped.id] = first
        again = replace(dropped, id=len(values), birth=stop, idle=(), movable=False, saved=-1, saved_at=-1)
        back[dropped.id] = again.id
        values.append(again)
        ops[stop] = replace(
            ops[stop],
            time_s=ops[stop].time_s + replay_s(tape, dropped),
            scratch_bytes=max(
                ops[stop].scratch_bytes,
                _making_bytes(tape, tape.values[dropped.id], drops.before.get(dropped.id, ()), births)
                - sum(result.size_bytes for result in births.get(stop, ())),
            ),
        )
        for source in dropped.sources:
            if source not in returns:
                values[source] = _present_at(values[source], stop)
    for dropped in drops.through:
        for source in dropped.sources:
            if source in back and values[back[source]].death < returns[dropped.id]:
                values[back[source]] = replace(values[back[source]], death=returns[dropped.id])
    return replace(tape, ops=tuple(ops), values=tuple(values))


def _making_bytes(
    tape: Tape, dropped: Value, before: Sequence[Value], births: Mapping[int, Sequence[Value]]
) -> int:
    """What making ``dropped`` again takes at its worst moment, besides it and its sources: what is made in
    passing ``before`` it, one after the other, is there until it is made."""
    held_bytes = worst_bytes = 0
    for source in before:
        worst_bytes = max(worst_bytes, held_bytes + _between_bytes(tape, source, births, counted=True))
        held_bytes += source.size_bytes
    return max(worst_bytes, held_bytes + _between_bytes(tape, dropped, births))


def _between_bytes(
    tape: Tape, made: Value, births: Mapping[int, Sequence[Value]], *, counted: bool = False
) -> int:
    """What the recipe of ``made`` takes at its worst moment: workspace, and intermediate results from the op
    that makes each to the last that reads it; ``made`` itself only if it is ``counted``."""
    last = {value: op for op in made.recipe for value in (*tape.ops[op].reads, *tape.ops[op].writes)}
    ends: dict[int, int] = {}
    present_bytes = worst_bytes = 0
    for op in made.recipe:
        for value in births.get(op, ()):
            if value.id != made.id:
                present_bytes += value.size_bytes
                end = max(op, last.get(value.id, op))
                ends[end] = ends.get(end, 0) + value.size_bytes
            elif counted:
                present_bytes += value.size_bytes
        worst_bytes = max(worst_bytes, present_bytes + tape.ops[op].scratch_bytes)
        present_bytes -= ends.get(op, 0)
    return worst_bytes


def _present_at(source: Value, op: int) -> Value:
    """The source, on the device at ``op``."""
    idle = tuple(
        _until(stretch, op) if stretch.start < op < stretch.stop else stretch
        for stretch in source.idle
        if not (stretch.start >= op and not wraps(stretch))
    )
    if idle == source.idle and op <= source.death:
        return source  # as it is
    return replace(source, idle=idle, movable=source.movable and bool(idle), death=max(source.death, op))


def _until(stretch: Stretch, op: int) -> Stretch:
    held_until = None if stretch.held_until is None else min(stretch.held_until, op)
    return Stretch(stretch.start, op, held_until)


def feasible(tape: Tape, ranked: Drops, limit_bytes: int) -> Drops:
    """Of ``ranked``, best first, those that can all be dropped and leave no op above ``limit_bytes``.

    What is made again needs its sources and intermediate results at one moment, which a tight op may
    have no room for: of what is there because of that, the last in rank are not dropped.
    """
    chosen = ranked
    while chosen.values:
        floor = floor_curve(with_drops(tape, chosen))
        worst = int(floor.argmax())
        if floor[worst] <= limit_bytes:
            return chosen
        returns = return_ops(chosen.through)
        present = [value.id for value in chosen.through if _present(tape, value, returns[value.id], worst)]
        if not present:
            return Drops()  # it is too much without any drops
        given_up = set(present[-max(1, round(GIVEN_UP * len(present))) :])
        chosen = replace(chosen, values=tuple(value for value in chosen.values if value.id not in given_up))
    return chosen


def _present(tape: Tape, dropped: Value, back: int, op: int) -> bool:
    """Whether making ``dropped`` again has something on the device during ``op`` that need not be there."""
    sources = [tape.values[source] for source in dropped.sources]
    needs = (stretch.stop for source in sources for stretch in source.idle)
    kept = any(source.death < op <= back for source in sources)
    return kept or back <= op <= max((back, dropped_while(dropped).stop, *needs))
