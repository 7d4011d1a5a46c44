"""Loading: a tape whose data loading is folded, so that it compares with that of another batch size.

A loader runs ops of its own between two steps: as many as the batch has samples, or, with workers, as many
as there happened to be batches to take in. What belongs to the step says nothing of how many. Here each run
of such ops becomes one op, ``NAME``, that needs as much memory as they did at their most; what they leave
behind for the step stays a value, and what lies in memory without being read by the step becomes one value
for each stretch of time. So a folded tape has the peak of the tape it was made of.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torchlms.core.curve import baseline_curve, wraps
from torchlms.core.tape import Kind, Op, Phase, Tape, Value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchlms.core.tape import Stretch

NAME = "data loading"

_OF_THE_STEP = {Kind.PARAMETER, Kind.BUFFER, Kind.GRADIENT, Kind.STATE}


def folded(first: Tape, second: Tape) -> tuple[Tape, Tape] | None:
    """Both with their data loading folded at the same places; None if neither has any."""
    pair = _Loading(first), _Loading(second)
    gaps = sorted({gap for loading in pair for gap in loading.gaps})
    if not gaps:
        return None
    folds = [_Fold(loading, gaps) for loading in pair]
    lives = sorted({life for fold in folds for life in fold.aside})
    one, other = (fold.tape(lives) for fold in folds)
    return one, other


def loading_ops(tape: Tape) -> set[int]:
    """Ops between backward and forward passes that touch nothing of the step: not what its passes touch, no
    parameter, gradient, state, buffer or saved value, and nothing that was made of these between passes."""
    step = {value.id for value in tape.values if value.kind in _OF_THE_STEP or value.saved >= 0}
    for op in tape.ops:
        if op.phase is not Phase.BETWEEN:
            step.update(op.reads, op.writes)
    loading = set()
    for index, op in enumerate(tape.ops):
        if op.phase is not Phase.BETWEEN:
            continue
        if step.isdisjoint((*op.reads, *op.writes)):
            loading.add(index)
        else:
            step.update(op.writes)
    return loading


@dataclass(frozen=True)
class _Loading:
    """A tape and which of its ops load data. A gap is how many ops of the step lie before a run of these."""

    tape: Tape

    @cached_property
    def ops(self) -> set[int]:
        return loading_ops(self.tape)

    @cached_property
    def before(self) -> list[int]:
        """By op, and for the end of the tape: how many ops of the step come before it."""
        counts = [0]
        for index in range(len(self.tape.ops)):
            counts.append(counts[-1] + (index not in self.ops))
        return counts

    @cached_property
    def gaps(self) -> set[int]:
        return {self.before[index] for index in self.ops}

    @cached_property
    def left_out(self) -> set[int]:
        """Values that only data loading touches."""
        loaded = self._touched(self.ops)
        return loaded - self._touched(index for index in range(len(self.tape.ops)) if index not in self.ops)

    def _touched(self, ops: Iterable[int]) -> set[int]:
        return {
            value for index in ops for value in (*self.tape.ops[index].reads, *self.tape.ops[index].writes)
        }


@dataclass(frozen=True)
class _Fold:
    """Where everything of one tape is once there is one op at each of ``gaps``, and nothing else of loading.

    Lives only get longer by folding and idle stretches shorter, never the other way.
    """

    loading: _Loading
    gaps: list[int]

    @cached_property
    def aside(self) -> Counter[tuple[int, int]]:
        """Bytes that only data loading touches and that outlive one run of it, by birth and death."""
        lives: Counter[tuple[int, int]] = Counter()
        for value in self.loading.left_out:
            birth, death = self._life(self.loading.tape.values[value])
            if birth != death:
                lives[birth, death] += self.loading.tape.values[value].size_bytes
        return lives

    def tape(self, lives: list[tuple[int, int]]) -> Tape:
        """The folded tape; ``lives`` are of what lies aside in either, so that both have all of them."""
        old = self.loading.tape
        stays = [value for value in old.values if value.id not in self.loading.left_out]
        ids = {value.id: index for index, value in enumerate(stays)}
        values = [self._value(value, ids) for value in stays]
        for birth, death in lives:
            size_bytes = self.aside[birth, death]
            values.append(Value(len(values), Kind.OTHER, size_bytes, birth, death, op=NAME))
        aside = values[len(stays) :]
        made = replace(old, ops=tuple(self._ops(ids, aside)), values=tuple(values))
        return replace(made, ops=self._with_scratch(made))

    def _index(self, op: int) -> int:
        """Of an op of the step, or of the one that its run has become."""
        before = self.loading.before[op]
        if op in self.loading.ops:
            return before + self.gaps.index(before)
        return before + bisect_right(self.gaps, before)

    def _moment(self, op: int, *, late: bool) -> int:
        """Before ``op``: inside a run, before all of it or, if ``late``, after."""
        if op < 0:
            return op
        if op >= len(self.loading.tape.ops):
            return self.loading.before[-1] + len(self.gaps)
        inside = op in self.loading.ops and op - 1 in self.loading.ops
        return self._index(op) + (inside and late)

    def _life(self, value: Value) -> tuple[int, int]:
        return self._moment(value.birth, late=False), self._moment(value.death, late=False)

    def _value(self, old: Value, ids: dict[int, int]) -> Value:
        birth, death = self._life(old)
        again = self.loading.ops.isdisjoint(old.recipe)
        return replace(
            old,
            id=ids[old.id],
            # Whether the batch was taken in during this step or before it is chance.
            kind=Kind.INPUT if old.birth in self.loading.ops else old.kind,
            birth=birth,
            death=death,
            idle=self._stretches(old.idle),
            held=self._stretches(old.held),
            saved_at=self._moment(old.saved_at, late=True),
            recipe=tuple(map(self._index, old.recipe)) if again else (),
            sources=tuple(ids[source] for source in old.sources) if again else (),
        )

    def _stretches(self, old: Iterable[Stretch]) -> tuple[Stretch, ...]:
        made = []
        end = self._moment(len(self.loading.tape.ops), late=False)
        for stretch in old:
            start, stop = self._moment(stretch.start, late=True), self._moment(stretch.stop, late=False)
            if start < (end if wraps(stretch) else stop):
                held = None if stretch.held_until is None else self._moment(stretch.held_until, late=True)
                made.append(replace(stretch, start=start, stop=stop, held_until=held))
        return tuple(made)

    def _ops(self, ids: dict[int, int], aside: list[Value]) -> list[Op]:
        old, loading = self.loading.tape, self.loading
        times_s = dict.fromkeys(self.gaps, 0.0)
        for index in sorted(loading.ops):
            times_s[loading.before[index]] += old.ops[index].time_s
        made: list[Op] = []
        for before in range(loading.before[-1] + 1):
            if before in times_s:
                born = tuple(value.id for value in aside if value.birth == len(made))
                made.append(Op(NAME, "", Phase.BETWEEN, times_s[before], (), born))
            if before < len(self._kept):
                op = self._kept[before]
                reads, writes = (tuple(ids[value] for value in part) for part in (op.reads, op.writes))
                made.append(replace(op, reads=reads, writes=writes))
        return made

    @cached_property
    def _kept(self) -> list[Op]:
        return [op for index, op in enumerate(self.loading.tape.ops) if index not in self.loading.ops]

    def _with_scratch(self, made: Tape) -> tuple[Op, ...]:
        """What a run needed at its most, beyond the values that are still there."""
        there, now = baseline_curve(self.loading.tape), baseline_curve(made)
        most: Counter[int] = Counter()
        for index in self.loading.ops:
            place = self._index(index)
            most[place] = max(most[place], int(there[index] - now[place]))
        return tuple(
            replace(op, scratch_bytes=most[index]) if index in most else op
            for index, op in enumerate(made.ops)
        )
