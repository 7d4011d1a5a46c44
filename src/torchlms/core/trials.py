"""Trials: the sets of drops that were tried, the plan of moves for each, and which is the best so far."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchlms.core.drops import Drops
from torchlms.core.pace import NOTICED, Load
from torchlms.core.search import WHOLE
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchlms.core.plan import Plan
    from torchlms.core.planned import Planned
    from torchlms.core.tape import Value

LOOK = 0.25  # of the usual effort, for a set that is only looked at

Key = tuple[frozenset[int], frozenset[int]]


class Trials:
    """``make`` plans the moves for a set of drops, with that share of the usual effort; ``least_s`` is what a
    step takes with a set, if it never waits: a set for which that is too much is not planned for."""

    def __init__(self, make: Callable[[Drops, float], Planned], least_s: Callable[[Drops], float]) -> None:
        self._make = make
        self._least_s = least_s
        self._made: dict[Key, Planned | None] = {}
        self._searched: set[Key] = set()  # with the whole effort
        self._refusal: BudgetTooSmall | HostBudgetTooSmall | None = None
        self._best = Drops()

    def of(
        self, values: Sequence[Value], passing: frozenset[int] | None = None, *, effort: float = LOOK
    ) -> bool:
        """Whether to drop ``values`` is better than all that was tried before. A set is looked at once, and
        once more with the whole effort. What is made in passing stays so, if nothing is said of it."""
        drops = Drops.passing_where_away(values, self._best.passing if passing is None else passing)
        key = _key(drops)
        if key in (self._made if effort < WHOLE else self._searched):
            return False
        if effort >= WHOLE:
            self._searched.add(key)
        before = self.cost_s
        if effort < WHOLE and self._least_s(drops) >= before:
            self._made[key] = None
            return False
        try:
            made = self._made[key] = self._make(drops, effort)
        except (BudgetTooSmall, HostBudgetTooSmall) as error:
            self._made[key] = None
            # Without its traceback, or the frames would keep tensors alive.
            self._refusal = self._refusal or error.with_traceback(None)
            return False
        better = self._cost_s(made, drops) < before
        if better:
            self._best = drops
        return better

    def search_best(self) -> None:
        """The best set with the whole effort."""
        self.of(self.best, effort=WHOLE)

    @property
    def best(self) -> tuple[Value, ...]:
        return self._best.values

    @property
    def passing(self) -> frozenset[int]:
        """What the best set makes in passing."""
        return self._best.passing

    @property
    def count(self) -> int:
        return len(self._made)

    @property
    def cost_s(self) -> float:
        """Of the best set."""
        made = self._made.get(_key(self._best))
        return self._cost_s(made, self._best) if made is not None else math.inf

    @staticmethod
    def _cost_s(made: Planned, drops: Drops) -> float:
        """The step, on average of both speeds of copies, and some of what the values that leave ask of the
        program."""
        return made.step_s + NOTICED.lap_s(load(made.plan, drops))

    @property
    def free_of_stalls(self) -> bool:
        made = self._made.get(_key(self._best))
        return made is not None and not made.waits

    @property
    def moved(self) -> list[int]:
        """The values that the best plan moves."""
        made = self._made.get(_key(self._best))
        return [move.value for move in made.plan.moves] if made is not None else []

    @property
    def smallest_bytes(self) -> int:
        return min(made.plan.smallest_bytes for made in self._made.values() if made is not None)

    def winner(self) -> tuple[Drops, Planned]:
        """The best set and its plan; what the first set was refused with, if none had one."""
        made = self._made.get(_key(self._best))
        if made is None:
            assert self._refusal is not None
            raise self._refusal
        return self._best, made


def load(moves: Plan, drops: Drops) -> Load:
    return Load(len(moves.moves) + len(drops.values), sum(len(value.recipe) for value in drops.through))


def _key(drops: Drops) -> Key:
    return frozenset(value.id for value in drops.values), drops.passing
