"""Joint: one plan over keep, host, disk and recompute.

What to drop is decided first and what to move second, over and over: for each of several sets of drops
the planner of moves plans the tape as it would be with them, and the simulator's word on the whole step
decides, together with what the plan asks of the program. First come the cheapest so many, then sets that
differ from the best one by a group of values. Dropping nothing is one of the sets, so that the result is
never predicted to be slower than moving alone by more than its values ask of the program.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from torchlms.core.again import feasible, with_drops
from torchlms.core.drops import (
    Drops,
    droppable,
    dropped_in,
    dropped_while,
    gain_bytes,
    replay_s,
    return_ops,
    short_chains,
)
from torchlms.core.headroom import NO_ELBOW, Elbow
from torchlms.core.pace import NOTICED, Load, paced
from torchlms.core.plan import Choice, Decision, Plan
from torchlms.core.planner import plan as plan_moves
from torchlms.core.rules import Rules, leavers
from torchlms.core.units import seconds_text
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torchlms.core.machine import Machine
    from torchlms.core.pace import Pace
    from torchlms.core.plan import Budget
    from torchlms.core.tape import Tape, Value

CHAINS = (0.3, 0.15, 0.6)  # of the budget: the most that values made one from the other take together
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the droppable values, tried first
HALVINGS = 4  # then the interval around the best is halved as often; once on long tapes
FEW = 8  # sets that can be tried at most, and every second share has to do, without more
MANY = 24  # sets that can be tried at least: below that a tape is long
LOOK = 0.25  # of the usual effort, for a set that is only looked at
SETS = 130  # that are tried at the most, on a short tape
HALF_WORK = 2_000_000  # ops times droppable values of a tape on which half as many are tried
MOST_FLIPS = 64
PASSES_SHARE = 0.2  # of the sets, and beside them, to find out what is better made in passing
SHARE_LIKE = 0.35  # of the sets, where another plan gives a beginning
THINNER = (0.75, 0.5, 0.25)  # of the values dropped, the smallest are left out
WITHOUT_STALL = 1.001  # times the compute time: nothing is left to gain by dropping


def plan(
    tape: Tape,
    machine: Machine,
    budget: Budget,
    rules: Rules,
    *,
    headroom_bytes: int = 0,
    elbow: Elbow = NO_ELBOW,
    quick: bool = False,
    like: Plan | None = None,
    pace: Pace | None = None,
) -> Plan:
    """The plan with the shortest predicted step, and the least for the program to do beside it, over all that
    were tried; ``quick`` tries fewer, and so does a search that begins with what another plan of this tape
    (``like``) drops. ``pace`` is that of the program, where it is known and matters.

    Raises as the planner of moves does, when not even with drops there is a plan.
    """
    started_s = time.perf_counter()
    limit_bytes = budget.device_bytes - headroom_bytes
    compute_s = sum(op.time_s for op in tape.ops)
    ranked = _ranked(tape, rules, pace)
    fingerprint = tape.fingerprint

    def make(drops: Drops, effort: float) -> Plan:
        made = plan_moves(
            with_drops(tape, drops),
            machine,
            budget,
            _left_for_moves(rules, drops.values),
            headroom_bytes=headroom_bytes,
            elbow=elbow,
            effort=effort,
            fingerprint=fingerprint,
        )
        return replace(made, predicted=paced(made.predicted, tape, pace, _load(made, drops)))

    trials = _Trials(make, lambda drops: compute_s + sum(replay_s(tape, value) for value in drops.through()))
    trials.of((), effort=1.0)
    if ranked and not trials.free_of_stalls:
        most = int(SETS / (1 + len(tape.ops) * len(ranked) / HALF_WORK))
        if like is not None:
            most = int(most * SHARE_LIKE)
            trials.of(*_dropped_by(like, ranked))
        for share in () if trials.best else CHAINS if most >= MOST_FLIPS and not quick else CHAINS[:1]:
            chained = short_chains(ranked, share * limit_bytes)
            _try_shares(
                trials,
                feasible(tape, Drops(tuple(chained)), limit_bytes),
                shares=SHARES if most > FEW else SHARES[1::2],
                halvings=HALVINGS if most > MANY else 1,
            )
        if trials.cost_s == math.inf:  # nothing fits: then with as little there at once as can be
            in_passing = Drops(tuple(ranked), frozenset(value.id for value in ranked))
            _try_shares(trials, feasible(tape, in_passing, limit_bytes), shares=SHARES, halvings=1)
        if most > FEW:
            _thin_out(trials)
        if not quick:
            _turn(trials, ranked, most - trials.count)
            left = most - trials.count
            _make_in_passing(trials, ranked, int(PASSES_SHARE * most))
            _flip_groups(trials, ranked, min(MOST_FLIPS, left))
        trials.search_best()
    drops, moves = trials.winner()
    return replace(
        _joined(tape, machine, drops, moves),
        smallest_bytes=trials.smallest_bytes,
        plan_s=time.perf_counter() - started_s,
    )


def _dropped_by(plan: Plan, ranked: Sequence[Value]) -> tuple[list[Value], frozenset[int]]:
    """Of ``ranked``, what ``plan`` drops, and what of that is made in passing."""
    dropped = {move.value: move.passing for move in plan.moves if move.choice is Choice.RECOMPUTE}
    passing = frozenset(value for value, in_passing in dropped.items() if in_passing)
    return [value for value in ranked if value.id in dropped], passing


class _Trials:
    """Sets of drops that were tried, the plan of moves for each, and which is the best so far."""

    def __init__(self, make: Callable[[Drops, float], Plan], least_s: Callable[[Drops], float]) -> None:
        self._make = make
        self._least_s = least_s  # what a step takes with a set of drops, if it never waits
        self._made: dict[_Key, Plan | None] = {}
        self._searched: set[_Key] = set()  # with the whole effort
        self._refusal: BudgetTooSmall | HostBudgetTooSmall | None = None
        self._best = Drops()

    def of(
        self, values: Sequence[Value], passing: frozenset[int] | None = None, *, effort: float = LOOK
    ) -> bool:
        """Whether to drop ``values`` is better than all that was tried before. A set is looked at once, and
        once more with the whole effort. What is made in passing stays so, if nothing is said of it."""
        sources = frozenset(source for value in values for source in value.sources)
        drops = Drops(tuple(values), sources & (self._best.passing if passing is None else passing))
        key = _key(drops)
        if key in (self._made if effort < 1 else self._searched):
            return False
        if effort >= 1:
            self._searched.add(key)
        before = self.cost_s
        if effort < 1 and self._least_s(drops) >= before:
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
        self.of(self.best, effort=1.0)

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
    def _cost_s(made: Plan, drops: Drops) -> float:
        """The predicted step, and some of what the values that leave ask of the program."""
        return made.predicted.step_s + NOTICED.lap_s(_load(made, drops))

    @property
    def free_of_stalls(self) -> bool:
        made = self._made.get(_key(self._best))
        return made is not None and made.predicted.step_s <= WITHOUT_STALL * made.predicted.compute_s

    @property
    def moved(self) -> list[int]:
        """The values that the best plan moves."""
        made = self._made.get(_key(self._best))
        return [move.value for move in made.moves] if made is not None else []

    @property
    def smallest_bytes(self) -> int:
        return min(made.smallest_bytes for made in self._made.values() if made is not None)

    def winner(self) -> tuple[Drops, Plan]:
        """The best set and its plan; what the first set was refused with, if none had one."""
        made = self._made.get(_key(self._best))
        if made is None:
            assert self._refusal is not None
            raise self._refusal
        return self._best, made


def _load(moves: Plan, drops: Drops) -> Load:
    return Load(len(moves.moves) + len(drops.values), sum(len(value.recipe) for value in drops.through()))


_Key = tuple[frozenset[int], frozenset[int]]


def _key(drops: Drops) -> _Key:
    values = frozenset(value.id for value in drops.values)
    return values, drops.passing & values


def _try_shares(trials: _Trials, ranked: Drops, *, shares: Sequence[float], halvings: int) -> None:
    """The first so many of ``ranked``, closer and closer to the best number."""
    values, passing = ranked.values, ranked.passing
    counts = {0} | {max(1, round(share * len(values))) for share in shares if values}
    for count in sorted(counts):
        trials.of(values[:count], passing)
    for _ in range(halvings):
        best = len(trials.best)
        below = max((count for count in counts if count < best), default=0)
        above = min((count for count in counts if count > best), default=len(values))
        for count in ((below + best) // 2, (best + above) // 2):
            counts.add(count)
            trials.of(values[:count], passing)


def _thin_out(trials: _Trials) -> None:
    """Without the smallest values of the best set, which take the program as long as the largest."""
    for share in THINNER:
        by_size = sorted(trials.best, key=lambda value: value.size_bytes)
        trials.of(by_size[int(share * len(by_size)) :])


def _turn(trials: _Trials, ranked: Sequence[Value], most: int) -> None:
    """What the best plan moves is dropped instead, one value after the other, the largest first."""
    rank = {value.id: place for place, value in enumerate(ranked)}
    last = trials.count + most
    improved = True
    while improved:
        improved = False
        moved = sorted(
            (rank[move] for move in trials.moved if move in rank), key=lambda place: -ranked[place].size_bytes
        )
        for place in moved:
            if trials.count < last:
                improved |= trials.of((*trials.best, ranked[place]))


def _make_in_passing(trials: _Trials, ranked: Sequence[Value], most: int) -> None:
    """Instead of moving a value, or having it stay once something was made from it: sources are made in
    passing. The largest first, over and over while that helps."""
    by_id = {value.id: value for value in ranked}
    last = trials.count + most
    improved = True
    while improved and not trials.free_of_stalls:
        improved = False
        moved = {value for value in trials.moved if value in by_id}
        dropped = {value.id for value in trials.best}
        sources = {source for value in trials.best for source in value.sources}
        for id in sorted(moved | (dropped & sources), key=lambda id: -by_id[id].size_bytes):
            for values, passing in _ways(trials, by_id[id]):
                if trials.count < last:
                    improved |= trials.of(values, passing)


def _ways(trials: _Trials, value: Value) -> Iterator[tuple[Sequence[Value], frozenset[int]]]:
    """Sets like the best one, with ``value`` or what it is made from made in passing."""
    best, passing = trials.best, trials.passing
    dropped = {other.id for other in best}
    values = best if value.id in dropped else (*best, value)
    if value.id in dropped:
        yield values, passing ^ {value.id}
        return
    sources = frozenset(source for source in value.sources if source in dropped)
    if sources:
        yield values, passing | sources
    if any(value.id in other.sources for other in best):
        yield values, passing | {value.id}
        if sources:
            yield values, passing | sources | {value.id}


def _flip_groups(trials: _Trials, ranked: Sequence[Value], most: int) -> None:
    """Groups of neighbours in rank, ever smaller ones, taken in and left out while that helps."""
    size = len(ranked)
    left = most
    while size > 1 and left > 0:
        size = -(-size // 2)
        for start in range(0, len(ranked), size):
            group = ranked[start : start + size]
            ids = {value.id for value in group}
            without = [value for value in trials.best if value.id not in ids]
            for drops in ([*without, *group], without):
                if left > 0:
                    left -= 1
                    trials.of(drops)


def _left_for_moves(rules: Rules, drops: Sequence[Value]) -> Rules:
    """The rules for what is not dropped."""
    if rules.most_values is None:
        return rules
    return replace(rules, most_values=max(0, rules.most_values - len(drops)))


def _ranked(tape: Tape, rules: Rules, pace: Pace | None) -> list[Value]:
    """What may be dropped together, the fewest seconds for a byte gained first, those of the program
    included."""
    reasons = leavers(rules, tape)
    free = [
        value
        for value in tape.values
        if droppable(tape, value) and value.size_bytes >= rules.min_bytes and reasons.get(value.id) == ""
    ]
    gains = gain_bytes(tape, free)
    worth = [value for value in free if gains[value.id] > 0]

    def cost_s(value: Value) -> float:
        return replay_s(tape, value) + (pace or NOTICED).drop_s(value)

    return sorted(worth, key=lambda value: cost_s(value) / gains[value.id])


def _joined(tape: Tape, machine: Machine, drops: Drops, moves: Plan) -> Plan:
    """The moves' plan with the drops among its decisions, for the tape as it was. Each reason says what
    the other choice would have cost."""
    made = drops.through()
    returns = return_ops(made)
    dropped = tuple(
        Decision(
            value=value.id,
            stretch=dropped_in(value),
            choice=Choice.RECOMPUTE,
            release_op=dropped_while(value).start,
            reload_op=returns[value.id],
            reason=_dropped_text(tape, machine, value, passing=value.id in drops.passing),
            passing=value.id in drops.passing,
        )
        for value in made
    )
    kept = tuple(
        replace(decision, reason=decision.reason + _instead(tape, tape.values[decision.value]))
        for decision in moves.decisions
        if decision.value < len(tape.values)
    )
    decisions = sorted((*kept, *dropped), key=lambda decision: decision.value)
    return replace(moves, decisions=tuple(decisions))


def _dropped_text(tape: Tape, machine: Machine, value: Value, *, passing: bool) -> str:
    again = f"made again by {_ops_text(len(value.recipe))} in {seconds_text(replay_s(tape, value))}"
    others = ", and in passing for what is made from it" if passing else ""
    return f"{again}{others}; copies would take {seconds_text(machine.copies_s(value.size_bytes))}"


def _ops_text(count: int) -> str:
    return "1 op" if count == 1 else f"{count} ops"


def _instead(tape: Tape, value: Value) -> str:
    if not droppable(tape, value):
        return ""
    again = seconds_text(replay_s(tape, value))
    return f", beside computing; making it again would add {again} of computing"
