"""Drops: values that are let go of and made again when they are needed; which can be, and what from.

[Note: Chains]
A source may itself be dropped. Then it is made again first, which is where the value made from it is
needed, and stays until its own last use: a chain of such values is present all at once. Or it is made in
passing: for the one that asks, which lets go of it again, and once more for itself. That takes the ops of its
recipe each time, and no room in between. Which of the two is the planner's to say. A recipe that goes through
what is made in passing is longer, and its sources are those further back (``Drops.through``).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torchlms.core.curve import wraps
from torchlms.core.plan import Choice
from torchlms.core.tape import Stretch, Tape, Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchlms.core.plan import Decision


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


@dataclass(frozen=True)
class Drops:
    """What a plan drops; ``passing`` of that, by id, is made in passing where it is a source."""

    values: tuple[Value, ...] = ()
    passing: frozenset[int] = frozenset()

    @staticmethod
    def of(tape: Tape, decisions: Iterable[Decision]) -> Drops:
        """Those of a plan for ``tape``."""
        dropped = [decision for decision in decisions if decision.choice is Choice.RECOMPUTE]
        passing = frozenset(decision.value for decision in dropped if decision.passing)
        return Drops(tuple(tape.values[decision.value] for decision in dropped), passing)

    @staticmethod
    def passing_where_away(values: Sequence[Value], passing: frozenset[int]) -> Drops:
        """``values``, with those of ``passing`` made in passing that others are made from, and that are away
        whenever one of these is made: not dropped later, nor needed before."""
        first_asked = return_ops(values) if passing else {}
        dropped = {value.id: value for value in values}
        away, there = set[int](), set[int]()
        for user in values if passing else ():
            for source in passing.intersection(user.sources, dropped):
                gone = dropped_while(dropped[source])
                ever = gone.start < first_asked[user.id] and dropped_while(user).stop < gone.stop
                (away if ever else there).add(source)
        return Drops(tuple(values), frozenset(away - there))

    @cached_property
    def before(self) -> dict[int, tuple[Value, ...]]:
        """What is made in passing before a value, by its id: in this order, and there until it is made."""
        found: dict[int, tuple[Value, ...]] = {}
        dropped = {value.id: value for value in self.values}
        for value in reversed(users_first(self.values)) if self.passing else ():
            order: dict[int, Value] = {}
            passed = self.passing.intersection(value.sources, dropped)
            for source in sorted((dropped[source] for source in passed), key=lambda source: source.birth):
                order |= {further.id: further for further in (*found.get(source.id, ()), source)}
            if order:
                found[value.id] = tuple(order.values())
        return found

    @cached_property
    def through(self) -> tuple[Value, ...]:
        """The values with the recipes that are really carried out: those of what is made in passing come
        first, each as a whole, and its sources are theirs, too."""
        return tuple(
            _lengthened(value, self.before[value.id]) if value.id in self.before else value
            for value in self.values
        )


def _lengthened(value: Value, before: Sequence[Value]) -> Value:
    parts = (*before, value)
    sources = {source for part in parts for source in part.sources} - {part.id for part in before}
    recipe = tuple(op for part in parts for op in part.recipe)
    return replace(value, recipe=recipe, sources=tuple(sorted(sources)))


def return_ops(drops: Sequence[Value]) -> dict[int, int]:
    """Before which op each of ``drops`` is made again, by id: its own need, or of one made from it."""
    returns = {value.id: dropped_while(value).stop for value in drops}
    begins = {value.id: dropped_while(value).start for value in drops}
    for value in users_first(drops):
        for source in value.sources:
            # Whoever still holds it then has not let it be dropped yet.
            if source in returns and begins[source] < returns[value.id]:
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
