"""Joint: one plan over keep, host, disk and recompute.

What to drop is decided first and what to move second, over and over: for each of several sets of drops,
cheapest first, the planner of moves plans the tape as it would be with them, and the simulator's word on
the whole step decides. Dropping nothing is one of the sets, so that the result is never predicted to be
slower than moving alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from torchlms.core.drops import (
    droppable,
    feasible,
    gain_bytes,
    replay_s,
    return_ops,
    short_chains,
    with_drops,
)
from torchlms.core.plan import Choice, Decision, Plan
from torchlms.core.planner import NO_ELBOW, Elbow
from torchlms.core.planner import plan as plan_moves
from torchlms.core.rules import Rules, Verdict
from torchlms.core.units import seconds_text
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.core.machine import Machine
    from torchlms.core.plan import Budget
    from torchlms.core.tape import Tape, Value

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the droppable values, tried first
LOOK = 0.25  # of the usual effort, for a set that is only looked at
HALVINGS = 2  # then the interval around the best is halved as often
WITHOUT_STALL = 1.001  # times the compute time: nothing is left to gain by dropping


def plan(
    tape: Tape,
    machine: Machine,
    budget: Budget,
    rules: Rules,
    *,
    headroom_bytes: int = 0,
    elbow: Elbow = NO_ELBOW,
) -> Plan:
    """The plan with the shortest predicted step over all that were tried.

    Raises as the planner of moves does, when not even with drops there is a plan.
    """
    started_s = time.perf_counter()
    ranked = feasible(tape, _ranked(tape, rules), budget.device_bytes - headroom_bytes)
    tried: dict[int, Plan] = {}
    refusal: BudgetTooSmall | HostBudgetTooSmall | None = None

    def attempt(count: int, effort: float = LOOK) -> None:
        nonlocal refusal
        if count in tried and effort < 1:
            return
        drops = ranked[:count]
        try:
            moves = plan_moves(
                with_drops(tape, drops),
                machine,
                budget,
                rules,
                headroom_bytes=headroom_bytes,
                elbow=elbow,
                effort=effort,
            )
        except (BudgetTooSmall, HostBudgetTooSmall) as error:
            refusal = refusal or error.with_traceback(None)  # or its frames would keep tensors alive
            return
        tried[count] = _joined(tape, machine, drops, moves)

    attempt(0, 1.0)
    if ranked and not (0 in tried and _free_of_stalls(tried[0])):
        for share in SHARES:
            attempt(max(1, round(share * len(ranked))))
        for _ in range(HALVINGS):
            for count in _between(tried, len(ranked)):
                attempt(count)
    if not tried:
        assert refusal is not None
        raise refusal
    attempt(_best(tried), 1.0)
    best = tried[_best(tried)]
    smallest_bytes = min(made.smallest_bytes for made in tried.values())
    return replace(best, smallest_bytes=smallest_bytes, plan_s=time.perf_counter() - started_s)


def _ranked(tape: Tape, rules: Rules) -> list[Value]:
    """What may be dropped together, the fewest seconds for a byte gained first."""
    free = [
        value
        for value in tape.values
        if droppable(tape, value)
        and value.size_bytes >= rules.min_bytes
        and rules.judge(value)[0] is Verdict.FREE
    ]
    gains = gain_bytes(tape, free)
    worth = [value for value in free if gains[value.id] > 0]
    return short_chains(sorted(worth, key=lambda value: replay_s(tape, value) / gains[value.id]))


def _free_of_stalls(made: Plan) -> bool:
    return made.predicted.step_s <= WITHOUT_STALL * made.predicted.compute_s


def _best(tried: dict[int, Plan]) -> int:
    return min(tried, key=lambda count: tried[count].predicted.step_s)


def _between(tried: dict[int, Plan], most: int) -> list[int]:
    """Counts half-way from the best to its neighbours."""
    if not tried:
        return []
    best = _best(tried)
    below = max((count for count in tried if count < best), default=0)
    above = min((count for count in tried if count > best), default=most)
    return [(below + best) // 2, (best + above) // 2]


def _joined(tape: Tape, machine: Machine, drops: Sequence[Value], moves: Plan) -> Plan:
    """The moves' plan with the drops among its decisions, for the tape as it was. Each reason says what
    the other choice would have cost."""
    returns = return_ops(tape, drops)
    dropped = tuple(
        Decision(
            value=value.id,
            stretch=0,
            choice=Choice.RECOMPUTE,
            release_op=value.idle[0].start,
            reload_op=returns[value.id],
            reason=f"made again by {len(value.recipe)} ops in {seconds_text(replay_s(tape, value))}; "
            f"copies would take {seconds_text(_copies_s(machine, value.size_bytes))}",
        )
        for value in drops
    )
    kept = tuple(
        replace(decision, reason=decision.reason + _instead(tape, tape.values[decision.value]))
        for decision in moves.decisions
        if decision.value < len(tape.values)
    )
    decisions = sorted((*kept, *dropped), key=lambda decision: decision.value)
    return replace(moves, fingerprint=tape.fingerprint, decisions=tuple(decisions))


def _instead(tape: Tape, value: Value) -> str:
    if not droppable(tape, value):
        return ""
    return f"; making it again would take {seconds_text(replay_s(tape, value))}"


def _copies_s(machine: Machine, size_bytes: int) -> float:
    if machine.link:
        return machine.out_s(size_bytes) + machine.in_s(size_bytes)
    if not machine.disk_write_bytes_per_s or not machine.disk_read_bytes_per_s:
        return float("inf")
    return machine.disk_write_s(size_bytes) + machine.disk_read_s(size_bytes)
