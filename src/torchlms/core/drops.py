"""Drops: a tape as it would be if some values were let go and made again when they are needed.

A dropped value is two on the new tape: itself until the idle stretch begins that it is dropped in, and
another, at the end of the list, from where it is made again. There the op takes longer by the recipe,
needs room for its intermediate results, each until its last use, and the sources must be present: a
source's own idle stretch ends there at the latest, and it lives until then at least. A source that autograd
did not save is kept for it alone.

[Note: Chains]
A source may itself be dropped. Then it is made again first, which is where the value made from it is
needed, and stays until its own last use: each value is made once, and a chain of them is present all at
once. That is the price of long chains, and the simulator sees it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from torchlms.core.curve import floor_curve, wraps
from torchlms.core.tape import Stretch, Tape, Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

GIVEN_UP = 0.25  # of what makes an op too large, at a time


def droppable(tape: Tape, value: Value) -> bool:
    """Whether ``value`` has a recipe, and an idle stretch to be away in."""
    if not (value.movable and value.recipe):
        return False
    index = dropped_in(value)
    return index >= 0 and not wraps(value.idle[index]) and value.idle[index].stop < len(tape.ops)


def dropped_in(value: Value) -> int:
    """In which of its idle stretches ``value`` would be dropped: the first in which the program lets go of
    it; -1 for none."""
    for index, stretch in enumerate(value.idle):
        if wraps(stretch) or stretch.free_from < stretch.stop:
            return index
    return -1


def dropped_while(value: Value) -> Stretch:
    """The stretch that ``value`` could be dropped in, from the moment when it could; needs ``droppable``."""
    stretch = value.idle[dropped_in(value)]
    return Stretch(stretch.free_from, stretch.stop)


def replay_s(tape: Tape, value: Value) -> float:
    """Seconds that making ``value`` again takes."""
    return sum(tape.ops[op].time_s for op in value.recipe)


def gain_bytes(tape: Tape, values: Iterable[Value]) -> dict[int, float]:
    """What dropping each of ``values`` frees, by id: its bytes, less its share of what is kept for it."""
    candidates = list(values)
    askers = Counter(source for value in candidates for source in value.sources)
    return {
        value.id: value.size_bytes
        - sum(
            tape.values[source].size_bytes / askers[source]
            for source in value.sources
            if tape.values[source].saved < 0
        )
        for value in candidates
    }


def short_chains(ranked: Iterable[Value], most_bytes: float) -> list[Value]:
    """Of ``ranked``, best first, those that can be dropped without a chain of more than ``most_bytes``."""
    chosen: dict[int, Value] = {}
    above: dict[int, int] = {}  # bytes of the largest chain that ends with the value
    below: dict[int, int] = {}  # and that begins with it
    made_from: dict[int, Sequence[int]] = {}
    makes: dict[int, list[int]] = {}
    for value in ranked:
        own = value.size_bytes
        up = own + max((above[source] for source in value.sources if source in chosen), default=0)
        down = own + max((below[other] for other in makes.get(value.id, ())), default=0)
        if up + down - own > most_bytes:
            continue
        chosen[value.id] = value
        above[value.id] = below[value.id] = 0
        made_from[value.id] = value.sources
        for source in value.sources:
            makes.setdefault(source, []).append(value.id)
        _lengthen(chosen, value.id, up, above, makes)
        _lengthen(chosen, value.id, down, below, made_from)
    return list(chosen.values())


def feasible(tape: Tape, ranked: Sequence[Value], limit_bytes: int) -> list[Value]:
    """Of ``ranked``, best first, those that can all be dropped and leave no op above ``limit_bytes``.

    What is made again needs its sources and intermediate results at one moment, which a tight op may
    have no room for: of what is there because of that, the last in rank are not dropped.
    """
    chosen = list(ranked)
    while chosen:
        floor = floor_curve(with_drops(tape, chosen))
        worst = int(floor.argmax())
        if floor[worst] <= limit_bytes:
            return chosen
        returns = return_ops(tape, chosen)
        present = [value.id for value in chosen if _present(tape, value, returns[value.id], worst)]
        if not present:
            return []  # it is too much without any drops
        given_up = set(present[-max(1, round(GIVEN_UP * len(present))) :])
        chosen = [value for value in chosen if value.id not in given_up]
    return chosen


def _present(tape: Tape, dropped: Value, back: int, op: int) -> bool:
    """Whether making ``dropped`` again has something on the device during ``op`` that need not be there."""
    sources = [tape.values[source] for source in dropped.sources]
    needs = (stretch.stop for source in sources for stretch in source.idle)
    kept = any(source.death < op <= back for source in sources)
    return kept or back <= op <= max((back, dropped_while(dropped).stop, *needs))


def return_ops(tape: Tape, drops: Sequence[Value]) -> dict[int, int]:
    """Before which op each of ``drops`` is made again, by id: its own need, or of one made from it."""
    returns = {value.id: dropped_while(value).stop for value in drops}
    for value in users_first(drops):
        for source in value.sources:
            # Whoever still holds it then has not let it be dropped yet.
            if source in returns and dropped_while(tape.values[source]).start < returns[value.id]:
                returns[source] = min(returns[source], returns[value.id])
    return returns


def users_first(drops: Sequence[Value]) -> list[Value]:
    """``drops`` with each value before those that it is made from."""
    dropped = {value.id: value for value in drops}
    done: set[int] = set()
    order: list[Value] = []
    for first in drops:
        path = [first]
        while path:
            value = path[-1]
            waiting = [source for source in value.sources if source in dropped and source not in done]
            if value.id in done or not waiting:
                path.pop()
                if value.id not in done:
                    done.add(value.id)
                    order.append(value)
            else:
                path.append(dropped[waiting[0]])
    return order[::-1]


def with_drops(tape: Tape, drops: Sequence[Value]) -> Tape:
    """``tape`` if ``drops`` were dropped. The values keep their ids; what comes back gets new ones."""
    ops, values = list(tape.ops), list(tape.values)
    births: dict[int, list[Value]] = {}
    for value in tape.values:
        births.setdefault(value.birth, []).append(value)
    returns = return_ops(tape, drops)
    for dropped in drops:
        start, stop = dropped_while(dropped).start, returns[dropped.id]
        before = dropped.idle[: dropped_in(dropped)]
        death = max(start - 1, dropped.birth, 0)
        first = replace(values[dropped.id], death=death, idle=before, movable=bool(before))
        values[dropped.id] = first
        again = replace(dropped, id=len(values), birth=stop, idle=(), movable=False, saved=-1, saved_at=-1)
        values.append(again)
        ops[stop] = replace(
            ops[stop],
            time_s=ops[stop].time_s + replay_s(tape, dropped),
            scratch_bytes=max(ops[stop].scratch_bytes, _between_bytes(tape, dropped, births)),
        )
        for source in dropped.sources:
            if source not in returns:
                values[source] = _present_at(values[source], stop)
    return replace(tape, ops=tuple(ops), values=tuple(values))


def _between_bytes(tape: Tape, dropped: Value, births: Mapping[int, Sequence[Value]]) -> int:
    """What making ``dropped`` again takes at its worst moment, besides it and its sources: workspace, and
    intermediate results from the op that makes each to the last that reads it."""
    last = {value: op for op in dropped.recipe for value in (*tape.ops[op].reads, *tape.ops[op].writes)}
    ends: dict[int, int] = {}
    present_bytes = worst_bytes = 0
    for op in dropped.recipe:
        for value in births.get(op, ()):
            if value.id != dropped.id:
                present_bytes += value.size_bytes
                end = max(op, last.get(value.id, op))
                ends[end] = ends.get(end, 0) + value.size_bytes
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


def _lengthen(
    chosen: Mapping[int, Value],
    first: int,
    size_bytes: int,
    known: dict[int, int],
    next_ones: Mapping[int, Sequence[int]],
) -> None:
    """A chain of ``size_bytes`` now ends with ``first``: those that go on from there are larger."""
    waiting = [(first, size_bytes)]
    while waiting:
        value, chain_bytes = waiting.pop()
        if value in known and known[value] < chain_bytes:
            known[value] = chain_bytes
            for other in next_ones.get(value, ()):
                if other in chosen:
                    waiting.append((other, chain_bytes + chosen[other].size_bytes))
