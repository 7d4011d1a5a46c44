"""Planner: tape, machine, budget and rules in; the plan with the shortest predicted step found, out.

    candidates   idle stretches of movable values that the rules leave free
    seeds        covers of the excess over the budget, taken in several orders, with several amounts
                 of room to spare for copies back
    improve      exchange, add and drop single values while the simulator says that it pays
    finish       places in host memory and on disk, reasons, the prediction

The search is deterministic: its effort is counted in work, not in seconds.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from torchlms.core.bound import lower_bound
from torchlms.core.cover import left_over
from torchlms.core.curve import smallest_budget, wraps
from torchlms.core.headroom import NO_ELBOW, Elbow
from torchlms.core.held import with_held
from torchlms.core.moves import Move, Slot
from torchlms.core.pace import NOTICED, Load
from torchlms.core.plan import Budget, Decision, Plan
from torchlms.core.planned import SLOWER, Planned, Speeds
from torchlms.core.rules import Rules, leavers
from torchlms.core.schedule import Course
from torchlms.core.search import WHOLE, decision_of, search
from torchlms.core.simulate import Simulator, prediction
from torchlms.core.tiers import Places, Room
from torchlms.core.units import bytes_text, rounded_up, seconds_text
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchlms.core.curve import Bytes
    from torchlms.core.machine import Machine
    from torchlms.core.tape import Tape, Value

__all__ = ["better", "lower_bound", "plan", "plan_for"]

_SMALL = 1 / 2048  # of the budget: moving such a value takes the program as long as moving a large one


@dataclass(frozen=True, slots=True)
class _Task:
    """What is to be planned: what could leave, and under what limit."""

    simulator: Simulator
    course: Course
    candidates: Sequence[Move]
    budget: Budget
    rules: Rules
    fingerprint: str
    smallest_bytes: int
    effort: float
    speeds: Speeds


def plan(
    tape: Tape,
    machine: Machine,
    budget: Budget,
    rules: Rules = Rules(),  # noqa: B008  (frozen)
    *,
    headroom_bytes: int = 0,
    elbow: Elbow = NO_ELBOW,
    effort: float = WHOLE,
    copies: float = SLOWER,
) -> Plan:
    """A plan whose peak, by the simulator, is at most ``budget.device_bytes - headroom_bytes``, or less if
    the rules ask for more headroom.

    ``elbow`` is free memory that ops and copies are given beyond that where it can be had; ``effort`` is
    how long to search, as a share of the usual; ``copies`` how fast they are counted on to be, as a share of
    what the machine says ([Note: Slower copies]). Moves nothing when everything fits, unless a rule demands
    it. The step time is the best found, not a proven optimum; ``lower_bound`` says how far off it can be.
    Stretches that wrap around the end of the tape stay on the device. Raises BudgetTooSmall or
    HostBudgetTooSmall when there is no such plan.
    """
    started_s = time.perf_counter()

    def made_for(speed: float) -> Planned:
        return plan_for(
            tape,
            machine,
            budget,
            rules,
            headroom_bytes=headroom_bytes,
            elbow=elbow,
            effort=effort,
            speed=speed,
            copies=copies,
        )

    best = better(made_for(copies), lambda: made_for(1.0))
    return replace(best.plan, plan_s=time.perf_counter() - started_s)


def better(planned: Planned, for_fast_copies: Callable[[], Planned]) -> Planned:
    """``planned``, or what is made for copies as the machine has them where the step waits for them all the
    same, and that is better at both speeds together."""
    if not planned.waits or planned.slower_step_s == planned.plan.predicted.step_s:
        return planned  # nothing to gain, or by no other copies
    with contextlib.suppress(HostBudgetTooSmall):
        return min(planned, for_fast_copies(), key=_cost_s)
    return planned


def plan_for(
    tape: Tape,
    machine: Machine,
    budget: Budget,
    rules: Rules,
    *,
    headroom_bytes: int,
    elbow: Elbow,
    effort: float,
    speed: float,
    copies: float,
    fingerprint: str = "",
) -> Planned:
    """A plan for copies that go at ``speed`` times that of the machine, and its step with the slower
    ``copies``; all else as for ``plan``. ``fingerprint`` is that of the plan, if not the tape's."""
    task = _task(
        Simulator(tape, machine.with_copies(speed)),
        budget,
        rules,
        headroom_bytes=max(headroom_bytes, rules.headroom_bytes or 0),
        elbow=elbow,
        fingerprint=fingerprint or tape.fingerprint,
        effort=effort,
        speeds=Speeds(1 / speed, copies / speed),
    )
    least_bytes = max(rules.min_bytes, int(_SMALL * budget.device_bytes))
    if not any(rules.min_bytes <= move.size_bytes < least_bytes for move in task.candidates):
        best = _plan(task, rules.min_bytes)
    else:
        try:
            best = _plan(task, least_bytes)
        except HostBudgetTooSmall:
            best = _plan(task, rules.min_bytes)  # fewer bytes may do where smaller values leave
        else:
            if effort >= WHOLE and best.waits:
                best = min(best, _plan(task, rules.min_bytes), key=_cost_s)
    return best


def _cost_s(planned: Planned) -> float:
    """The predicted step, and some of what its moves ask of the program."""
    return planned.step_s + NOTICED.lap_s(Load(len(planned.plan.moves)))


def _task(
    simulator: Simulator,
    budget: Budget,
    rules: Rules,
    *,
    headroom_bytes: int,
    elbow: Elbow,
    fingerprint: str,
    effort: float,
    speeds: Speeds,
) -> _Task:
    """Raises BudgetTooSmall where no plan could do."""
    tape = simulator.tape
    limit_bytes = budget.device_bytes - headroom_bytes
    candidates = _candidates(simulator, rules)
    floor = _floor(simulator.baseline, candidates)
    if len(floor) and floor.max() > limit_bytes:
        raise _too_small(simulator, floor, budget, headroom_bytes)
    course = Course(
        tuple(op.time_s for op in tape.ops),
        simulator.baseline + np.minimum(_room_for_new(tape, elbow), limit_bytes - floor),
        limit_bytes,
        elbow.flying,
        ahead_ops=rules.reload_ahead_ops,
        within_ops=rules.within_ops,
        waits_out=rules.waits_out,
    )
    smallest_bytes = int(floor.max(initial=0)) + headroom_bytes
    return _Task(simulator, course, candidates, budget, rules, fingerprint, smallest_bytes, effort, speeds)


def _plan(task: _Task, least_bytes: int) -> Planned:
    """The plan that moves values of at least ``least_bytes``, and smaller ones only where it must."""
    simulator, course, tape = task.simulator, task.course, task.simulator.tape
    worthy = _worth_moving(
        course.baseline, task.candidates, (least_bytes, task.rules.min_bytes), course.limit_bytes
    )
    room = _room(simulator.machine, task.budget)
    found = search(simulator, course, worthy, room, effort=task.effort, speeds=task.speeds)
    plan = Plan(
        fingerprint=task.fingerprint,
        torch=tape.torch,
        device=tape.device,
        budget=task.budget,
        decisions=tuple(_decision(slot, found.places, task.speeds) for slot in found.slots),
        predicted=prediction(
            found.timeline, arena_bytes=found.places.arena_bytes, spill_bytes=found.places.spill_bytes
        ),
        smallest_bytes=task.smallest_bytes,
        model=tape.model,
    )
    return Planned(plan, found.timeline.compute_s + found.slower_stall_s)


def _candidates(simulator: Simulator, rules: Rules) -> list[Move]:
    """Every idle stretch that could be spent elsewhere, whatever its size."""
    reasons = leavers(rules, simulator.tape)
    return [
        _move(simulator, value, index, forced=reasons[value.id])
        for value in simulator.tape.values
        if value.id in reasons
        for index, stretch in enumerate(value.idle)
        if not wraps(stretch)
    ]


def _move(simulator: Simulator, value: Value, index: int, *, forced: str) -> Move:
    machine, stretch = simulator.machine, value.idle[index]
    out_s, in_s = simulator.copy_s(value.size_bytes)
    disk = _disk_works(machine)
    return Move(
        value=value.id,
        stretch=index,
        size_bytes=value.size_bytes,
        start=stretch.start,
        stop=stretch.stop,
        idle_s=float(simulator.moments_s[stretch.stop] - simulator.moments_s[stretch.start]),
        out_s=out_s,
        in_s=in_s,
        write_s=machine.disk_write_s(value.size_bytes) if disk else 0.0,
        read_s=machine.disk_read_s(value.size_bytes) if disk else 0.0,
        forced=forced,
    )


def _floor(baseline: Bytes, candidates: Sequence[Move]) -> Bytes:
    """The curve with all candidates away: ``floor_curve``, as far as the rules permit."""
    return left_over(baseline, candidates)


def _room_for_new(tape: Tape, elbow: Elbow) -> Bytes:
    """What each op is given beyond what it allocates."""
    new_bytes = np.array([op.scratch_bytes for op in tape.ops], dtype=np.int64)
    for value in tape.values:
        if value.birth >= 0:
            new_bytes[value.birth] += value.size_bytes
    return (elbow.new * new_bytes).astype(np.int64)


def _worth_moving(
    baseline: Bytes, candidates: Sequence[Move], least_bytes: Sequence[int], limit_bytes: int
) -> Sequence[Move]:
    """The candidates of at least the first size, or the next, that could make it fit; else all of them."""
    for size_bytes in least_bytes:
        large = [move for move in candidates if move.forced or move.size_bytes >= size_bytes]
        if _floor(baseline, large).max(initial=0) <= limit_bytes:
            return large
    return candidates


def _room(machine: Machine, budget: Budget) -> Room:
    has_link = bool(machine.link)
    return Room(
        host_bytes=budget.host_bytes if has_link else 0,
        disk_bytes=budget.disk_bytes if _disk_works(machine) else 0,
        has_link=has_link,
    )


def _disk_works(machine: Machine) -> bool:
    return machine.disk_write_bytes_per_s > 0 and machine.disk_read_bytes_per_s > 0


def _decision(slot: Slot, places: Places, speeds: Speeds) -> Decision:
    """The slot as a record, its reason with the times that the machine says."""
    move = slot.move
    why = f"rule {move.forced}" if move.forced else f"idle {seconds_text(move.idle_s)}"
    beside = f"copies {seconds_text(move.copies_s / speeds.machine)}"
    where = ", host memory full" if slot.on_disk and move.out_s else ""
    return decision_of(slot, offset_bytes=places.offsets_bytes[move], reason=f"{why}, {beside}{where}")


def _too_small(simulator: Simulator, floor: Bytes, budget: Budget, headroom_bytes: int) -> BudgetTooSmall:
    """Names the op that needs most at once, what of it are its own operands, and the smallest budget."""
    tape = simulator.tape
    worst = int(floor.argmax())
    op = tape.ops[worst]
    touched = set(op.reads) | set(op.writes)
    operands_bytes = sum(tape.values[value].size_bytes for value in touched) + op.scratch_bytes
    smallest_bytes = rounded_up(int(floor[worst]) + headroom_bytes)
    without_rules_bytes = rounded_up(smallest_budget(tape) + headroom_bytes)
    with_held_bytes = rounded_up(smallest_budget(with_held(tape)) + headroom_bytes)
    hint = (
        f" Without the rules it is {bytes_text(without_rules_bytes)} ({without_rules_bytes} bytes)."
        if without_rules_bytes < smallest_bytes
        else f" With rule held it is {bytes_text(with_held_bytes)} ({with_held_bytes} bytes)."
        if with_held_bytes < smallest_bytes
        else ""
    )
    return BudgetTooSmall(
        f"a device budget of {bytes_text(budget.device_bytes)} is too small: op {worst} ({op.name} in "
        f"{op.module or 'no module'}) needs {bytes_text(int(floor[worst]))} at once, "
        f"{bytes_text(operands_bytes)} of it for its own operands, with everything away that a plan can have "
        f"away. The smallest budget with a plan is {bytes_text(smallest_bytes)} ({smallest_bytes} bytes)"
        f"{f', {bytes_text(headroom_bytes)} of it headroom' if headroom_bytes else ''}.{hint}",
        smallest_bytes=smallest_bytes,
    )
