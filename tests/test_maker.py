"""How much of the budget plans leave free: usually some pages, less where it pays, more where they evict."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tapes import GIB, MIB, Network, chain, cpu, gpu

from torchlms.core import joint, planner
from torchlms.core.calibrate import AS_MEASURED, Rates, foretold
from torchlms.core.headroom import ELBOW, headroom_bytes, lean_bytes
from torchlms.core.machine import Machine
from torchlms.core.pace import Pace, lap_s
from torchlms.core.plan import Budget, Choice, Plan
from torchlms.core.planned import SLOWER
from torchlms.core.rules import Rules
from torchlms.core.tape import Tape, Value
from torchlms.director import Director
from torchlms.eager.routine import TIMINGS, Routine, Verdict
from torchlms.errors import BudgetTooSmall
from torchlms.maker import Maker

BUDGET = Budget(4 * GIB, 64 * GIB, 0)
USUAL = headroom_bytes(gpu(), BUDGET.device_bytes, drops=False)
LEAN = lean_bytes(gpu(), BUDGET.device_bytes)


def maker(machine: Machine | None = None, budget: Budget = BUDGET, **rules: Any) -> Maker:
    return Maker(machine=machine or gpu(), budget=budget, rules=Rules(**{"recompute": False, **rules}))


class Only(list[Routine]):
    """The routines of an engine that has met one."""

    def usual(self) -> None:
        return None


def engine_of(routine: Routine, asked: list[int]) -> Any:
    """An engine that notes how large an arena it was ``asked`` for."""
    return SimpleNamespace(
        ladder=SimpleNamespace(reclaims=3),
        device=SimpleNamespace(is_cuda=True),
        routines=Only([routine]),
        store=SimpleNamespace(plan_arena=asked.append),
        restart_measuring=lambda: None,
    )


def _made_again(tape: Tape) -> Tape:
    """With values that can each be made again from the one before."""

    def told(value: Value) -> Value:
        sources = tape.ops[value.birth].reads if value.saved >= 0 and value.birth > 0 else ()
        if not sources or any(tape.values[source].saved < 0 for source in sources):
            return value
        return replace(value, recipe=(value.birth,), sources=sources)

    return replace(tape, values=tuple(told(value) for value in tape.values))


def few_large() -> Tape:
    """Fits beside the lean headroom and not beside the usual one; what would then leave is half a GiB."""
    network = Network()
    last = network.layer("data", 512 * MIB, 1e-3)
    for index in range(5):
        last = network.layer("aten.linear", 512 * MIB, 1e-3, last, module=f"layer{index}")
    return network.tape()


def test_plans_leave_some_pages() -> None:
    made = maker()
    plan = made.first(chain(80, time_s=20e-3), rough=False)
    assert plan.moves
    assert plan.predicted.peak_device_bytes <= BUDGET.device_bytes - USUAL
    assert made.headroom_bytes == USUAL


def test_less_is_left_where_that_promises_to_be_faster() -> None:
    from torchlms.core.curve import baseline_curve

    tape = few_large()
    peak_bytes = int(baseline_curve(tape).max())
    budget_bytes = int(peak_bytes / 0.98)
    made = maker(budget=Budget(budget_bytes, 64 * GIB, 0))
    usual_bytes = made.headroom_bytes
    lean = made.first(tape, rough=False)
    assert made.headroom_bytes == lean_bytes(gpu(), budget_bytes)
    assert lean.predicted.peak_device_bytes > budget_bytes - usual_bytes
    made.headroom_bytes = usual_bytes
    again = made.first(tape, rough=False)  # evictions have told: once is enough
    assert made.headroom_bytes == usual_bytes
    assert again.predicted.step_s > lean.predicted.step_s


def test_a_rough_plan_is_not_worth_a_second_one() -> None:
    tape = few_large()
    made = maker(budget=Budget(3 * GIB, 64 * GIB, 0))
    usual_bytes = made.headroom_bytes
    made.first(tape, rough=True)
    assert made.headroom_bytes == usual_bytes


@pytest.mark.parametrize("asked_bytes", [0, USUAL // 2, 2 * USUAL])
def test_headroom_that_was_asked_for(asked_bytes: int) -> None:
    """No less and no more, and no plan without it where there is no room for it."""
    made = maker(headroom_bytes=asked_bytes)
    assert made.headroom_bytes == asked_bytes
    plan = made.first(chain(80, time_s=20e-3), rough=False)
    assert made.headroom_bytes == asked_bytes
    assert plan.predicted.peak_device_bytes <= BUDGET.device_bytes - asked_bytes
    with pytest.raises(BudgetTooSmall):
        maker(headroom_bytes=BUDGET.device_bytes).first(chain(80), rough=False)


def test_less_memory_than_its_pages_were_made_for_takes_more_headroom() -> None:
    """And no plan with little of it is tried: holes as large as the old pages would force evictions."""
    tape = few_large()
    large, small = Budget(12 * GIB, 64 * GIB, 0), Budget(3 * GIB, 64 * GIB, 0)
    made = maker(budget=large)
    at_first_bytes = made.headroom_bytes
    made.rebudget(small)
    assert made.budget == small
    assert made.headroom_bytes > maker(budget=small).headroom_bytes
    wary = made.first(tape, rough=False)
    assert wary.predicted.peak_device_bytes <= small.device_bytes - made.headroom_bytes
    made.rebudget(large)
    assert made.headroom_bytes == at_first_bytes


def test_headroom_that_was_learned_is_kept_with_another_budget() -> None:
    made = maker(budget=Budget(12 * GIB, 64 * GIB, 0))
    usual_bytes = made.headroom_bytes
    assert made.again(chain(80, time_s=20e-3)) is not None
    learned_bytes = made.headroom_bytes - usual_bytes
    assert learned_bytes > 0
    made.rebudget(Budget(int(11.9 * GIB), 64 * GIB, 0))
    assert made.headroom_bytes > usual_bytes + 0.9 * learned_bytes


def test_a_ledger_needs_no_headroom() -> None:
    assert maker(cpu()).headroom_bytes == 0


@pytest.mark.parametrize(
    ("before", "after"), [(LEAN, USUAL), (USUAL, USUAL + int(0.015 * BUDGET.device_bytes))]
)
def test_evictions_in_planned_steps_ask_for_more(before: int, after: int) -> None:
    made = Director(machine=gpu(), budget=BUDGET, rules=Rules(recompute=False), given=None, model="synthetic")
    made.maker.headroom_bytes = before
    tape = chain(80, time_s=20e-3)
    routine = Routine(SimpleNamespace())  # type: ignore[arg-type]
    engine = engine_of(routine, [])
    made._adopt(engine, routine, tape, made.maker._make(tape, before))
    routine.steps = 9
    made._watch(engine, routine)
    assert made.maker.headroom_bytes == before  # nothing was evicted since the plan was made
    for laps, expected in ((10, before), (21, before), (31, after)):  # now and then is no reason
        routine.laps = laps
        engine.ladder.reclaims += 1
        made._watch(engine, routine)
        assert made.maker.headroom_bytes == expected
    routine.steps, routine.laps = 9, 35  # the plan is another one, and has had to evict once
    engine.ladder.reclaims += 1
    made._watch(engine, routine)
    assert made.maker.headroom_bytes == after
    assert routine.program is not None
    assert routine.program.plan.predicted.peak_device_bytes <= BUDGET.device_bytes - after


@pytest.mark.parametrize(("settled", "recompute"), [(False, True), (True, True), (False, False)])
def test_a_rough_plan_that_may_drop_pins_no_host_memory(settled: bool, recompute: bool) -> None:
    """It mostly moves more than any later plan does; one that only moves does not."""
    rules = Rules(recompute=recompute)
    made = Director(machine=gpu(), budget=BUDGET, rules=rules, given=None, model="synthetic")
    asked: list[int] = []
    routine = Routine(SimpleNamespace())  # type: ignore[arg-type]
    routine.settled = settled
    plan = made.maker.first(chain(80, time_s=20e-3), rough=not settled)
    made._adopt(engine_of(routine, asked), routine, chain(80, time_s=20e-3), plan)
    assert asked == [0 if recompute and not settled else plan.predicted.arena_bytes]
    assert plan.predicted.arena_bytes


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("rates", "more_headroom", "drops"),
    [(AS_MEASURED, 0.3, True), (AS_MEASURED, 0.3, False), (AS_MEASURED, 0.0, False)],
    ids=["roomier", "roomier by moving alone", "moving alone"],
)
def test_no_contender_pins_more_than_was_said_or_moves_to_disk_instead(
    recompute: bool, rates: Rates, more_headroom: float, drops: bool
) -> None:
    tape = chain(80, time_s=2e-3)
    made = maker(budget=Budget(4 * GIB, 64 * GIB, 64 * GIB), recompute=recompute)
    first = made.first(tape, rough=False)
    other = made.other(tape, rates, first=first, drops=drops, more_headroom=more_headroom)
    assert other is not None or more_headroom, "at other speeds there is always the first"
    if other is not None:
        assert other.predicted.arena_bytes <= 1.05 * first.predicted.arena_bytes
        assert other.predicted.spill_bytes <= first.predicted.spill_bytes
        assert other.budget == made.budget


@pytest.mark.parametrize("rates", [Rates(copies=0.3), Rates(ops=0.5), Rates(ops=2.0)], ids=str)
def test_at_other_rates_as_much_leaves_by_moving_alone(rates: Rates) -> None:
    tape = chain(80, time_s=2e-3)
    made = maker()
    first = made.first(tape, rough=False)
    other = made.other(tape, rates, first=first)
    assert other is not None
    assert other.predicted.arena_bytes <= 1.05 * first.predicted.arena_bytes


@pytest.mark.parametrize("copies", [0.9, 0.7])
def test_a_plan_for_copies_that_were_found_slow_counts_on_no_slower_ones(copies: float) -> None:
    """Than those a fifth slower than measured, on which every plan counts."""
    tape, machine = _made_again(chain(80, time_s=1e-3)), gpu(link=100e9)
    made = maker(machine, Budget(2 * GIB, 64 * GIB, 0), recompute=True)
    first = made.first(tape, rough=False)
    other = made.other(tape, Rates(copies=copies), first=first)

    def planned(share: float) -> Plan:
        room: dict[str, Any] = {"headroom_bytes": made.headroom_bytes, "elbow": ELBOW}
        return joint.plan(tape, machine.with_copies(copies), made.budget, made.rules, copies=share, **room)

    expected = planned(min(1.0, SLOWER / copies))
    assert other is not None
    assert (other.decisions, other.predicted) == (expected.decisions, expected.predicted)
    assert other.decisions != planned(SLOWER).decisions


@pytest.mark.parametrize("recompute", [False, True])
def test_plans_are_made_for_slower_copies(recompute: bool) -> None:
    tape, machine = _made_again(chain(80, time_s=1e-3)), gpu(link=60e9)
    made = maker(machine, Budget(3 * GIB, 64 * GIB, 0), recompute=recompute)
    first = made.first(tape, rough=False)
    room: dict[str, Any] = {"headroom_bytes": made.headroom_bytes, "elbow": ELBOW}
    make = joint.plan if recompute else planner.plan
    plans = {
        copies: make(tape, machine, made.budget, made.rules, copies=copies, **room)
        for copies in (SLOWER, 1.0)
    }
    assert first.decisions == plans[SLOWER].decisions != plans[1.0].decisions


def test_where_drops_prove_dear_more_may_move_instead() -> None:
    tape = _made_again(chain(80, time_s=2e-4))
    made = maker(gpu(), Budget(2 * GIB, 64 * GIB, 0), recompute=True)
    first = made.first(tape, rough=False)
    assert any(move.choice is Choice.RECOMPUTE for move in first.moves)
    slow = Rates(pace=Pace(lap_s(tape, first.predicted.step_s), 2e-5, 1e-3))
    other = made.other(tape, slow, first=first)
    assert other is not None
    assert other.predicted.arena_bytes > 1.05 * first.predicted.arena_bytes
    assert other.predicted.step_s < foretold(tape, gpu(), first, slow).step_s


def test_on_the_cpu_the_disk_is_the_only_tier_and_contenders_may_take_more_of_it() -> None:
    tape = chain(80, time_s=20e-3)
    made = maker(cpu(), budget=Budget(4 * GIB, 0, 64 * GIB))
    first = made.first(tape, rough=False)
    other = made.other(tape, AS_MEASURED, first=first, more_headroom=0.1)
    assert other is not None
    assert other.predicted.spill_bytes > first.predicted.spill_bytes


def test_a_given_plan_with_which_nothing_moves_is_timed_first() -> None:
    """Else a later set_budget() would have to plan for the times of watching."""
    tape = chain(4)
    given = maker().first(tape, rough=False)
    assert not given.moves
    made = Director(machine=gpu(), budget=BUDGET, rules=Rules(), given=given, model="synthetic")
    routine = Routine(SimpleNamespace())  # type: ignore[arg-type]
    engine = engine_of(routine, [])
    routine.recorded(tape)
    made.prepare(engine, routine)
    assert routine.verdict is Verdict.FOLLOW
    routine.timings.extend([[(op.name, op.time_s) for op in tape.ops]] * TIMINGS)
    made.prepare(engine, routine)
    assert routine.settled
    assert routine.verdict is Verdict.FITS


def test_another_kind_of_step_than_that_of_the_given_plan_is_planned_for_its_times() -> None:
    given = maker().first(chain(4), rough=False)
    made = Director(machine=gpu(), budget=BUDGET, rules=Rules(), given=given, model="synthetic")
    made._given_fits = True
    tape = chain(80, time_s=20e-3)
    routine = Routine(SimpleNamespace())  # type: ignore[arg-type]
    engine = engine_of(routine, [])
    routine.recorded(tape)
    made.prepare(engine, routine)
    rough = routine.program
    routine.timings.extend([[(op.name, op.time_s) for op in tape.ops]] * TIMINGS)
    made.prepare(engine, routine)
    assert routine.settled
    assert routine.program is not rough
