"""Director: decides what a routine does next. Records first, then plans, watches, and plans again."""

from __future__ import annotations

import logging
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torchlms.core import joint, planner
from torchlms.core.calibrate import Rates, explanation, foretold, heat, scaled, stretched
from torchlms.core.curve import peak_bytes
from torchlms.core.headroom import ELBOW, NO_ELBOW, headroom_bytes, lean_bytes
from torchlms.core.pace import lap_s
from torchlms.core.plan import Budget, Choice, Plan, Prediction
from torchlms.core.rules import unmatched
from torchlms.eager.program import Program
from torchlms.eager.routine import TIMINGS, Routine, Signature, Verdict
from torchlms.eager.timer import evened, retimed
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall, LMSError, PlanMismatch
from torchlms.memory.limits import format_bytes
from torchlms.race import CLOSE, Contender, Race

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.core.machine import Machine
    from torchlms.core.pace import Pace
    from torchlms.core.rules import Rules
    from torchlms.core.tape import Tape
    from torchlms.eager.engine import Engine

log = logging.getLogger("torchlms")

# Added where the headroom that a plan leaves proves too little: a share of the budget.
_MORE_HEADROOM = 0.015
_MOST_REPLANS = 4
_MOST_CALIBRATIONS = 2
_AS_PREDICTED = 0.07  # off by less is as good as predicted
_WORTH_TRYING = 0.97  # of the step time with more headroom
_ROOMIER = 0.05  # of the budget, for a contender
_MOVES_ONLY = "moving alone"
_HOST_SHARE = 0.9  # of what is left, where host memory is refused
_MOST_HOST_REFUSALS = 3
_GROWN = 0.002  # of the budget: less is noise
_MOST_GROWTHS = 4
_SETTLING_STEPS = 4  # in which the allocator's pools find their sizes, and the pinches are learned


class Director:
    """Policy between the tape and the program of each routine."""

    def __init__(
        self,
        *,
        machine: Machine,
        budget: Budget,
        rules: Rules,
        given: Plan | None,
        model: str,
        planning: bool = True,
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        """``settled`` is called when a routine has been timed, and from there on runs as it will."""
        self.machine = machine
        self.budget = budget
        self.rules = rules
        self.given = given
        self.planning = planning
        self._settled = settled
        self.model = model
        self.headroom_bytes = self.usual_bytes = headroom_bytes(
            machine, budget.device_bytes, rules.headroom_bytes
        )
        self._reclaims_seen = 0
        self._checked_rules = False
        self._lean_tried = False
        self._races: dict[Signature, Race] = {}
        self._given_fits = False  # the plan given is that of some routine
        self._host_refusals = 0  # times that host memory which was planned was not to be had

    def rebudget(self, budget: Budget) -> None:
        """Plans from here on are for ``budget``; the one that was given is not."""
        self.budget = budget
        self.given = None
        self._races.clear()

    @property
    def racing(self) -> bool:
        """Whether plans are being timed against each other."""
        return any(not race.over for race in self._races.values())

    def prepare(self, engine: Engine, routine: Routine) -> None:
        """Called at the beginning of each micro-step, before its verdict is acted on."""
        if not self.planning:
            routine.improvise()
        elif routine.verdict is Verdict.RECORD and routine.tape is not None:
            if self.given is not None:
                self._take_given(engine, routine, self.given)
            else:
                self._plan(engine, routine, routine.tape)
        elif routine.verdict is Verdict.FOLLOW and not routine.settled and len(routine.timings) >= TIMINGS:
            self._settle(engine, routine)
        elif routine.verdict is Verdict.FOLLOW and routine.trust.refuted:
            self._distrust(engine, routine)
        elif routine.verdict is Verdict.FOLLOW and self._has_grown(engine, routine):
            pass
        elif routine.verdict is Verdict.FOLLOW:
            self._watch(engine, routine)
            if routine.settled and self.given is None:
                self._race(engine, routine)

    # -- planning ----------------------------------------------------------------------------

    def _plan(self, engine: Engine, routine: Routine, tape: Tape) -> None:
        """Plan, or go on without a plan: the step was recorded within the budget, so it can be run so."""
        for pattern in () if self._checked_rules else unmatched(self.rules, tape):
            log.warning("the rule %s matches nothing in this step: perhaps it is misspelt", pattern)
        self._checked_rules = True
        rough = not routine.settled  # its times are, and so no long search is worth its while
        try:
            plan = self._make_roomy(evened(tape) if rough and engine.device.is_cuda else tape, quick=rough)
        except (BudgetTooSmall, HostBudgetTooSmall) as refusal:
            routine.improvise()
            log.warning("going on without a plan, slowly: values leave as memory runs out. %s", str(refusal))
            return
        self._adopt(engine, routine, tape, plan)

    def _make_roomy(self, tape: Tape, *, quick: bool) -> Plan:
        """A plan with headroom, or without where there is none to have."""
        try:
            plan = self._make(tape, self.headroom_bytes, quick=quick)
        except BudgetTooSmall:
            return self._make(tape, 0, quick=quick)
        return plan if quick or self.rules.recompute else self._lean_or(plan, tape)

    def _lean_or(self, plan: Plan, tape: Tape) -> Plan:
        """A plan with less headroom, if that might be clearly faster: evictions will tell (``_watch``)."""
        spare_bytes = max(lean_bytes(self.machine, self.budget.device_bytes), self.rules.headroom_bytes or 0)
        if not plan.moves or spare_bytes >= self.headroom_bytes or self._lean_tried:
            return plan
        lean = self._make(tape, spare_bytes)
        if lean.predicted.step_s > _WORTH_TRYING * plan.predicted.step_s:
            return plan
        self._lean_tried = True
        self.headroom_bytes = spare_bytes
        return lean

    def _make(
        self,
        tape: Tape,
        headroom_bytes: int,
        *,
        machine: Machine | None = None,
        drops: bool = True,
        quick: bool = False,
        like: Plan | None = None,
        pace: Pace | None = None,
    ) -> Plan:
        machine = machine if machine is not None else self.machine
        elbow = ELBOW if machine.link else NO_ELBOW
        room: dict[str, Any] = {"headroom_bytes": headroom_bytes, "elbow": elbow}
        if self.rules.recompute and drops:
            return joint.plan(
                tape, machine, self.budget, self.rules, quick=quick, like=like, pace=pace, **room
            )
        return planner.plan(tape, machine, self.budget, self.rules, **room)

    def _settle(self, engine: Engine, routine: Routine) -> None:
        """Plan once more with the times that ops take when nobody watches them."""
        assert routine.tape is not None
        # What disturbs a device's op makes it longer. The threads of a CPU are disturbed all the time: the
        # shortest times of all ops would add up to less than any step takes.
        usual = min if engine.device.is_cuda else fmean
        routine.tape = retimed(routine.tape, routine.timings, usual)
        routine.settled = True
        self._settled()
        if self.given is None:
            if peak_bytes(routine.tape) > self.budget.device_bytes:
                log.info("planning a step of %d ops; for long ones this takes seconds", len(routine.tape.ops))
            self._plan(engine, routine, routine.tape)

    def _take_given(self, engine: Engine, routine: Routine, plan: Plan) -> None:
        assert routine.tape is not None
        tape = routine.tape
        if plan.fingerprint != tape.fingerprint:
            if self._given_fits:  # it is for another kind of step, such as a full batch
                self._plan(engine, routine, tape)
                return
            raise PlanMismatch(
                f"the plan given was made for another computation (fingerprint {plan.fingerprint}, this step "
                f"has {tape.fingerprint}): another model, batch or shape. Leave plan= out to make a new one"
            )
        self._given_fits = True
        self._adopt(engine, routine, tape, plan)

    def _adopt(
        self, engine: Engine, routine: Routine, tape: Tape, plan: Plan, *, quietly: bool = False
    ) -> None:
        self._follow(engine, routine, Program(tape, plan, routine.trust), quietly=quietly)

    def _follow(self, engine: Engine, routine: Routine, program: Program, *, quietly: bool = False) -> None:
        """Have the routine follow ``program``, perhaps one that it followed before."""
        tape, plan = program.tape, program.plan
        routine.steps = 0
        routine.program = program
        fits = not plan.moves
        known = routine.settled or self.given is not None
        routine.verdict = Verdict.FITS if fits and known and engine.device.is_cuda else Verdict.FOLLOW
        routine.rise_bytes = rise_bytes(tape)
        if not self._have_arena(engine):
            self._plan(engine, routine, tape)
            return
        if engine.usual() in (routine, None):  # a smaller last batch is not what figures are about
            engine.restart_measuring()
        self._reclaims_seen = engine.ladder.reclaims
        if quietly:
            log.debug("%s", planned_line(tape, plan, aside=False))
        elif routine.verdict is Verdict.FITS or routine.settled:
            log.info("%s", planned_line(tape, plan, aside=routine.verdict is Verdict.FITS))
        else:
            log.info("a first plan is made; timing each op under it for %d steps", TIMINGS)

    def _have_arena(self, engine: Engine) -> bool:
        """Take the host memory that the plans ask for; False if another plan is to be made, for less of it.

        What was free when LMS was entered may be somebody else's by now. Where that happens again and again
        the plan stays: its values leave for pageable memory, or for the disk, as ``Store.place`` finds room.
        """
        arena_bytes = max((known.predicted.arena_bytes for known in engine.plans()), default=0)
        try:
            engine.store.plan_arena(arena_bytes)
        except HostBudgetTooSmall as refusal:
            self._host_refusals += 1
            again = self.given is None and self._host_refusals <= _MOST_HOST_REFUSALS
            left_bytes = max(0, arena_bytes - refusal.missing_bytes)
            host_bytes = min(int(_HOST_SHARE * left_bytes), self.budget.host_bytes // 2)
            self.budget = replace(self.budget, host_bytes=host_bytes)
            engine.store.host_budget_bytes = host_bytes
            log.warning(
                "%s. %s",
                str(refusal),  # whoever keeps the record must not keep the frames of the error
                f"Planning again with {format_bytes(host_bytes)} of it"
                if again
                else "Values leave for wherever there is room, more slowly",
            )
            return not again
        return True

    def _distrust(self, engine: Engine, routine: Routine) -> None:
        """Plan again without the recipes that gave other bytes."""
        assert routine.tape is not None
        refuted, routine.trust.refuted = routine.trust.refuted, set()
        values = tuple(
            replace(value, recipe=()) if value.saved in refuted else value for value in routine.tape.values
        )
        wrong = ", ".join(sorted({value.op for value in values if value.saved in refuted}))
        log.info(
            "%d values cannot be made again with the same bytes (%s): planning without", len(refuted), wrong
        )
        routine.tape = replace(routine.tape, values=values)
        if self.given is None:
            self._plan(engine, routine, routine.tape)

    # -- racing ------------------------------------------------------------------------------

    def _race(self, engine: Engine, routine: Routine) -> None:
        """Time the plan, then others that may be faster; keep the fastest."""
        lap, routine.lap = routine.lap, None
        program, race = routine.program, self._races.get(routine.signature)
        routine.wants_lap = race is None or not race.over
        if lap is None or program is None or (race is not None and race.over):
            return
        if not program.plan.moves and race is None:
            return
        if race is None or program.plan is not race.running.plan:
            # The first plan, or one that was made anew meanwhile, without recipes that proved wrong.
            race = self._races[routine.signature] = Race([Contender(program.plan, "the plan made")])
        measured_s = lap.seconds
        learning = engine.device.is_cuda and program.lessons and not program.calm
        if measured_s is None or learning or self._feel_heat(routine, program, race):
            return
        race.running.program = program
        race.running.laps_s.append(measured_s)
        race.running.starved_laps += lap.starved
        race.running.spent_s.append(lap.spent_s)
        if race.running.done and not self._ask_heat(routine, race):
            self._next_contender(engine, routine, race)

    def _ask_heat(self, routine: Routine, race: Race) -> bool:
        """Have the ops timed once more, now that the device has run for a while; False if that was done, or
        nothing asks for it."""
        assert routine.tape is not None
        if race.felt_heat or not self._off(routine.tape, race.running):
            return False
        routine.check_wanted = True
        return True

    def _feel_heat(self, routine: Routine, program: Program, race: Race) -> bool:
        """Whether the lap just run is one whose ops were timed; from here on their times are those."""
        assert routine.tape is not None
        if routine.checked is None:
            return False
        factor, routine.checked, race.felt_heat = heat(routine.tape, routine.checked), None, True
        if factor == 1.0:
            return True
        routine.tape = program.tape = stretched(routine.tape, factor)
        predicted = foretold(routine.tape, self.machine, program.plan)
        race.running.plan = program.plan = replace(program.plan, predicted=predicted)
        log.info(
            "in a device that has run for a while ops take %.2f times as long: step %.1f ms predicted",
            factor,
            predicted.step_s * 1e3,
        )
        return True

    def _next_contender(self, engine: Engine, routine: Routine, race: Race) -> None:
        tape = routine.tape
        assert tape is not None
        contender = self._contender(tape, race)
        if contender is not None:
            race.contenders.append(contender)
            self._adopt(engine, routine, tape, contender.plan, quietly=True)
            return
        race.over = True
        if len(race.contenders) > 1:
            log.info("%s", race.result())
        winner = race.winner()
        ran_last, race.contenders = race.running, [winner]
        assert winner.program is not None
        winner.plan = winner.program.plan = self._corrected(tape, race, winner)
        winner.program.tape = tape
        if winner is not ran_last:
            self._follow(engine, routine, winner.program)

    def _corrected(self, tape: Tape, race: Race, winner: Contender) -> Plan:
        """The winner's plan, which from here on predicts what its steps have shown."""
        plan, between_s = (
            winner.plan,
            winner.plan.predicted.step_s - lap_s(tape, winner.plan.predicted.step_s),
        )
        if not winner.done or not self._off(tape, winner):
            return plan
        rates = explanation(tape, self.machine, plan, winner.median_s, each_s=winner.each_s)
        log.info(
            "steps take %.1f ms and not %.1f ms as was predicted: %s from here on",
            (winner.median_s + between_s) * 1e3,
            plan.predicted.step_s * 1e3,
            rates,
        )
        return replace(plan, predicted=foretold(tape, self.machine, plan, rates))

    def _off(self, tape: Tape, contender: Contender) -> bool:
        """Whether its laps took clearly more or less than was predicted."""
        predicted_s = lap_s(tape, contender.plan.predicted.step_s)
        return abs(contender.median_s / predicted_s - 1) > _AS_PREDICTED

    def _contender(self, tape: Tape, race: Race) -> Contender | None:
        """A plan that was not tried yet and might be faster than the best so far; None ends the race."""
        best = race.winner()
        predicted_s = lap_s(tape, foretold(tape, self.machine, best.plan, race.rates).step_s)
        slower = best.median_s > (1 + _AS_PREDICTED) * predicted_s
        if not race.roomier and self.machine.link and slower and not best.starved:
            # The allocator has to close holes; a plan that leaves more free lets it be.
            race.roomier = True
            made = self._made_or_none(tape, race.rates, like=best.plan, more_headroom=_ROOMIER)
            if made is not None and lap_s(tape, made.predicted.step_s) < best.median_s:
                return Contender(made, f"with {_ROOMIER:.0%} of the budget more to spare")
        if race.calibrations < _MOST_CALIBRATIONS and abs(best.median_s / predicted_s - 1) > _AS_PREDICTED:
            race.calibrations += 1
            race.rates = explanation(tape, self.machine, best.plan, best.median_s, each_s=best.each_s)
            # A program that is too slow for its device needs other drops, and not some more of the same.
            like = best.plan if race.rates.pace is None else None
            made = self._made_or_none(tape, race.rates, like=like)
            if made is not None and not race.knows(made):
                return Contender(made, str(race.rates))
        if any(contender.name == _MOVES_ONLY for contender in race.contenders):
            return None
        made = self._made_or_none(tape, race.rates, drops=False)
        if made is None or race.knows(made) or lap_s(tape, made.predicted.step_s) > CLOSE * best.median_s:
            return None
        return Contender(made, _MOVES_ONLY)

    def _made_or_none(
        self,
        tape: Tape,
        rates: Rates,
        *,
        like: Plan | None = None,
        drops: bool = True,
        more_headroom: float = 0.0,
    ) -> Plan | None:
        """Another plan, for other rates or with more room: one that may drop what ``like`` drops, or, without
        ``drops``, one that only moves. None where there is no such plan."""
        machine = scaled(self.machine, rates.copies)
        spare_bytes = self.headroom_bytes + int(more_headroom * self.budget.device_bytes)
        try:
            return self._make(
                stretched(tape, rates.ops),
                spare_bytes,
                machine=machine,
                drops=drops,
                like=like,
                pace=rates.pace,
            )
        except LMSError:
            return None

    # -- watching ----------------------------------------------------------------------------

    def _has_grown(self, engine: Engine, routine: Routine) -> bool:
        """Plan again if more is on the device before the step than when it was recorded: gradients that
        accumulate, an optimizer's states, what the program made since. True if that was done.

        What is seen once does not count: a step that failed may leave its graph for a while.
        """
        program = routine.program
        if program is None or self.given is not None or routine.growths >= _MOST_GROWTHS:
            return False
        tape = program.tape
        more_bytes = engine.device.allocated_bytes() - before_bytes(tape)
        peak = program.plan.predicted.peak_device_bytes + more_bytes
        spare_bytes = self.budget.device_bytes - self.headroom_bytes
        if more_bytes <= _GROWN * self.budget.device_bytes or peak <= spare_bytes:
            return False
        more_bytes, routine.grown_bytes = min(more_bytes, routine.grown_bytes), more_bytes
        return bool(more_bytes) and self._plan_for_more(engine, routine, tape, more_bytes)

    def _plan_for_more(self, engine: Engine, routine: Routine, tape: Tape, more_bytes: int) -> bool:
        """Plan for a step before which ``more_bytes`` more are there; False, and the plan stays, if there is
        no such plan."""
        routine.growths += 1
        routine.grown_bytes = 0
        tape = replace(tape, resident_bytes=tape.resident_bytes + more_bytes)
        said = "%s more than when it was recorded are on the device before this step: "
        try:
            plan = self._make_roomy(tape, quick=not routine.settled)
        except (BudgetTooSmall, HostBudgetTooSmall) as refusal:
            routine.growths = _MOST_GROWTHS
            log.warning(
                said + "no plan has room for that, so values leave when memory runs out. %s",
                format_bytes(more_bytes),
                str(refusal),
            )
            return False
        log.info(said + "planning again", format_bytes(more_bytes))
        routine.tape = tape
        self._adopt(engine, routine, tape, plan)
        return True

    def _watch(self, engine: Engine, routine: Routine) -> None:
        """Plan with more headroom when steps that should run undisturbed have to evict."""
        reclaims, before = engine.ladder.reclaims, self._reclaims_seen
        self._reclaims_seen = reclaims
        if reclaims == before or routine.steps < _SETTLING_STEPS or not self.machine.link:
            return
        if routine.replans >= _MOST_REPLANS or self.given is not None or routine.program is None:
            return
        routine.replans += 1
        before_bytes = self.headroom_bytes
        more_bytes = before_bytes + int(_MORE_HEADROOM * self.budget.device_bytes)
        self.headroom_bytes = self.usual_bytes if before_bytes < self.usual_bytes else more_bytes
        log.info(
            "holes between tensors forced %d evictions in a planned step: planning again with %s of headroom",
            reclaims - before,
            format_bytes(self.headroom_bytes),
        )
        tape = routine.program.tape
        try:
            plan = self._make(tape, self.headroom_bytes)
        except LMSError:
            routine.replans = _MOST_REPLANS  # no room for more headroom: go on with what there is
            self.headroom_bytes = before_bytes
            return
        self._adopt(engine, routine, tape, plan)


def before_bytes(tape: Tape) -> int:
    """What is on the device before a step begins."""
    return tape.resident_bytes + sum(value.size_bytes for value in tape.values if value.birth < 0)


def rise_bytes(tape: Tape) -> int:
    """How much more memory a step takes at its peak than before it begins."""
    return max(0, peak_bytes(tape) - before_bytes(tape))


def _off_device(predicted: Prediction) -> str:
    """Where what is away will lie, and how much memory that takes."""
    tiers = (("host memory", predicted.arena_bytes), ("disk", predicted.spill_bytes))
    taken = [f"{format_bytes(size_bytes)} of {name}" for name, size_bytes in tiers if size_bytes]
    return " and ".join(taken) or "nothing off the device"


def planned_line(tape: Tape, plan: Plan, *, aside: bool) -> str:
    """One line for the log: what was decided and what it should cost."""
    predicted = plan.predicted
    if aside:
        return (
            f"everything fits ({format_bytes(peak_bytes(tape))} of "
            f"{format_bytes(plan.budget.device_bytes)}): LMS stepped aside"
        )
    moved = [decision for decision in plan.moves if decision.choice in (Choice.HOST, Choice.DISK)]
    operands = [sum(tape.values[value].size_bytes for value in {*op.reads, *op.writes}) for op in tape.ops]
    largest = max(range(len(operands)), key=operands.__getitem__, default=-1)
    widest = ""
    if largest >= 0:
        op = tape.ops[largest]
        where = f" in {op.module}" if op.module else ""
        widest = f"; largest single op {op.name}{where}: {format_bytes(operands[largest])}"
    dropped = sum(decision.choice is Choice.RECOMPUTE for decision in plan.moves)
    again = f"{dropped} are dropped and made again, " if dropped else ""
    budget_bytes = plan.budget.device_bytes
    return (
        f"planned in {plan.plan_s:.2f} s: {len(moved)} values move, {again}"
        f"{format_bytes(predicted.bytes_out)} out and {format_bytes(predicted.bytes_in)} in per step; "
        f"predicted peak {format_bytes(predicted.peak_device_bytes)} of {format_bytes(budget_bytes)}, "
        f"{_off_device(predicted)}, "
        f"step {predicted.step_s * 1e3:.1f} ms ({predicted.stall_s * 1e3:.1f} ms waiting){widest}"
    )
