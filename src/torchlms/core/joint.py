"""Joint: one plan over keep, host, disk and recompute.

What to drop is decided first and what to move second, over and over: for each of several sets of drops
the planner of moves plans the tape as it would be with them, and the simulator's word on the whole step
decides, together with what the plan asks of the program. First come the cheapest so many; then what the best
plan moves is dropped, one value after the other; then some of that is made in passing; then come sets that
differ from the best one by a group of values. Dropping nothing is one of the sets.
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
from torchlms.core.pace import NOTICED
from torchlms.core.plan import Choice, Decision, Plan
from torchlms.core.planned import SLOWER
from torchlms.core.planner import better, plan_for
from torchlms.core.rules import Rules, leavers
from torchlms.core.search import WHOLE
from torchlms.core.trials import Trials, load
from torchlms.core.units import seconds_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torchlms.core.machine import Machine
    from torchlms.core.pace import Pace
    from torchlms.core.plan import Budget
    from torchlms.core.planned import Planned
    from torchlms.core.tape import Tape, Value

CHAINS = (0.3, 0.15, 0.6)  # of the budget: the most that values made one from the other take together
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the droppable values, tried first
HALVINGS = 4  # then the interval around the best is halved as often; once on long tapes
FEW = 8  # sets that can be tried at most, and every second share has to do, without more
MANY = 24  # sets that can be tried at least: below that a tape is long
SETS = 130  # that are tried at the most, on a short tape
HALF_WORK = 2_000_000  # ops times droppable values of a tape on which half as many are tried
MOST_FLIPS = 64
PASSES_SHARE = 0.2  # of the sets, and beside them, to find out what is better made in passing
SHARE_LIKE = 0.35  # of the sets, where another plan gives a beginning
THINNER = (0.75, 0.5, 0.25)  # of the values dropped, the smallest are left out


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
    copies: float = SLOWER,
) -> Plan:
    """The plan with the shortest step, and the least for the program to do beside it, over all that were
    tried; ``quick`` tries fewer, and so does a search that begins with what another plan of this tape
    (``like``) drops. ``pace`` is that of the program, where it is known and matters. Shortest is what is so
    on average of the machine's copies and of such that are ``copies`` times as fast ([Note: Slower copies]).

    Raises as the planner of moves does, when not even with drops there is a plan.
    """
    started_s = time.perf_counter()
    limit_bytes = budget.device_bytes - headroom_bytes
    compute_s = sum(op.time_s for op in tape.ops)
    ranked = _ranked(tape, rules, pace)
    fingerprint = tape.fingerprint

    def make(drops: Drops, effort: float, speed: float = copies) -> Planned:
        made = plan_for(
            with_drops(tape, drops),
            machine,
            budget,
            _left_for_moves(rules, drops.values),
            headroom_bytes=headroom_bytes,
            elbow=elbow,
            effort=effort,
            speed=speed,
            copies=copies,
            fingerprint=fingerprint,
        )
        return made.paced(tape, pace, load(made.plan, drops))

    def finished() -> Plan:
        drops, planned = trials.winner()
        best = planned if quick else better(planned, lambda: make(drops, WHOLE, speed=1.0))
        return _joined(tape, machine, drops, best.plan)

    trials = Trials(make, lambda drops: compute_s + sum(replay_s(tape, value) for value in drops.through))
    trials.of((), effort=WHOLE)
    if ranked and not trials.free_of_stalls:
        most = int(SETS / (1 + len(tape.ops) * len(ranked) / HALF_WORK))
        if like is not None:
            most = int(most * SHARE_LIKE)
            before = Drops.of(tape, like.moves)
            dropped = {value.id for value in before.values}
            trials.of([value for value in ranked if value.id in dropped], before.passing)
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
    return replace(
        finished(),
        smallest_bytes=trials.smallest_bytes,
        plan_s=time.perf_counter() - started_s,
    )


def _try_shares(trials: Trials, ranked: Drops, *, shares: Sequence[float], halvings: int) -> None:
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


def _thin_out(trials: Trials) -> None:
    """Without the smallest values of the best set, which take the program as long as the largest."""
    for share in THINNER:
        by_size = sorted(trials.best, key=lambda value: value.size_bytes)
        trials.of(by_size[int(share * len(by_size)) :])


def _turn(trials: Trials, ranked: Sequence[Value], most: int) -> None:
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


def _make_in_passing(trials: Trials, ranked: Sequence[Value], most: int) -> None:
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


def _ways(trials: Trials, value: Value) -> Iterator[tuple[Sequence[Value], frozenset[int]]]:
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


def _flip_groups(trials: Trials, ranked: Sequence[Value], most: int) -> None:
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
    returns = return_ops(drops.through)
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
        for value in drops.through
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
