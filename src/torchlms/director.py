"""Director: decides what a routine does next. Records first, then plans, watches, and plans again."""

from __future__ import annotations

import logging
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from torchlms.core.curve import before_bytes, peak_bytes, rise_bytes
from torchlms.core.held import with_held
from torchlms.core.plan import Budget, Choice, Plan, Prediction
from torchlms.core.rules import unmatched
from torchlms.core.validate import IMPOSSIBLE, validate
from torchlms.eager.program import Program
from torchlms.eager.routine import TIMINGS, Routine, Verdict
from torchlms.eager.timer import evened, retimed
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall, PlanMismatch
from torchlms.maker import Maker
from torchlms.memory.limits import format_bytes
from torchlms.referee import Referee, race_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.core.machine import Machine
    from torchlms.core.rules import Rules
    from torchlms.core.tape import Tape
    from torchlms.eager.engine import Engine

log = logging.getLogger("torchlms")

_MOST_REPLANS = 4
_HOST_SHARE = 0.9  # of what is left, where host memory is refused
_MOST_HOST_REFUSALS = 3
_GROWN = 0.002  # of the peak: less is noise
_MOST_GROWTHS = 4
_NOW_AND_THEN = 10  # steps between two that had to evict: more are no reason for another plan
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
        """``settled`` is called when a routine has been timed, and when its plan is the last one.

        Raises HostBudgetTooSmall where a plan is given that the budget has no room for."""
        self.machine = machine
        self.rules = rules
        self.given = given
        if given is not None:
            _require_room(given.predicted, budget)
        self.planning = planning
        self._settled = settled
        self.model = model
        self.maker = Maker(machine=machine, budget=budget, rules=rules)
        self.referee = Referee(self.maker, self._follow, settled)
        self._reclaims_seen = 0
        self._checked_rules = False
        self._given_fits = False  # the plan given is that of some routine
        self._host_refusals = 0  # times that host memory which was planned was not to be had

    def rebudget(self, budget: Budget) -> None:
        """Plans from here on are for ``budget``; the one that was given is not."""
        self.maker.rebudget(budget)
        self.given = None

    @property
    def budget(self) -> Budget:
        """What plans are made for now."""
        return self.maker.budget

    def racing(self, engine: Engine) -> bool:
        """Whether plans for the usual kind of step are being timed against each other."""
        usual = engine.routines.usual()
        race = race_of(usual) if usual is not None else None
        return race is not None and not race.over

    def prepare(self, engine: Engine, routine: Routine) -> None:
        """Called at the beginning of each micro-step, before its verdict is acted on."""
        if not self.planning:
            routine.improvise()
        elif routine.verdict is Verdict.RECORD and routine.tape is not None:
            if self.rules.held:
                routine.tape = with_held(routine.tape)
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
                self.referee.note(engine, routine)

    # -- planning ----------------------------------------------------------------------------

    def _plan(self, engine: Engine, routine: Routine, tape: Tape) -> None:
        """Plan, or go on without a plan: the step was recorded within the budget, so it can be run so."""
        for pattern in () if self._checked_rules else unmatched(self.rules, tape):
            log.warning("the rule %s matches nothing in this step: perhaps it is misspelt", pattern)
        self._checked_rules = True
        rough = not routine.settled  # its times are, and so no long search is worth its while
        try:
            plan = self.maker.first(evened(tape) if rough and engine.device.is_cuda else tape, rough=rough)
        except (BudgetTooSmall, HostBudgetTooSmall) as refusal:
            routine.improvise()
            if isinstance(refusal, BudgetTooSmall):
                routine.refused_bytes = refusal.smallest_bytes
            log.warning("going on without a plan, slowly: values leave as memory runs out. %s", str(refusal))
            return
        self._adopt(engine, routine, tape, plan)

    def _settle(self, engine: Engine, routine: Routine) -> None:
        """Plan once more with the times that ops take when nobody watches them."""
        assert routine.tape is not None
        # What disturbs a device's op makes it longer. The threads of a CPU are disturbed all the time: the
        # shortest times of all ops would add up to less than any step takes.
        usual = min if engine.device.is_cuda else fmean
        routine.tape = retimed(routine.tape, routine.timings, usual)
        routine.settled = True
        self._settled()
        if self._follows_given(routine):
            assert routine.program is not None
            self._follow(engine, routine, routine.program)
            return
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
        faults = [fault for fault in validate(tape, plan, self.machine) if fault.reason in IMPOSSIBLE]
        if faults:
            others = f", and {len(faults) - 1} more like it" if faults[1:] else ""
            raise PlanMismatch(
                f"the plan given cannot be carried out in this step: {faults[0]}{others}. It was changed, or "
                f"made with another rule held (here it is {self.rules.held}): give the rules that it was "
                "made with, or leave plan= out to make a new one"
            )
        self._given_fits = True
        self._adopt(engine, routine, tape, plan)

    def _follows_given(self, routine: Routine) -> bool:
        """Whether its plan is the one that was given, and not made here for another kind of step."""
        given, program = self.given, routine.program
        return given is not None and program is not None and program.plan.fingerprint == given.fingerprint

    def _adopt(self, engine: Engine, routine: Routine, tape: Tape, plan: Plan) -> None:
        self._follow(engine, routine, Program(tape, plan, routine.trust))

    def _follow(self, engine: Engine, routine: Routine, program: Program, *, quietly: bool = False) -> None:
        """Have the routine follow ``program``, perhaps one that it followed before."""
        tape, plan = program.tape, program.plan
        routine.steps = 0
        routine.evicted_in = None
        routine.program = program
        aside = not plan.moves and routine.settled and engine.device.is_cuda
        routine.verdict = Verdict.FITS if aside else Verdict.FOLLOW
        routine.rise_bytes = rise_bytes(tape)
        if not self._have_arena(engine):
            self._plan(engine, routine, tape)
            return
        if engine.routines.usual() in (routine, None):  # a smaller last batch is not what figures are about
            engine.restart_measuring()
        self._reclaims_seen = engine.ladder.reclaims
        if quietly:
            log.debug("%s", planned_line(tape, plan, aside=False))
        elif routine.verdict is Verdict.FITS or routine.settled:
            log.info("%s", planned_line(tape, plan, aside=routine.verdict is Verdict.FITS))
        else:
            made = "given" if self._follows_given(routine) else "made"
            log.info("a first plan is %s; timing each op under it for %d steps", made, TIMINGS)

    def _have_arena(self, engine: Engine) -> bool:
        """Take the host memory that the plans ask for; False if another plan is to be made, for less of it.

        A plan for rough times has none where values may be dropped: it mostly moves more than any later plan
        does, and for those few steps that goes to pageable memory. What was free when LMS was entered may be
        somebody else's by now. Where that happens again and again the plan stays: its values leave for
        pageable memory, too, or for the disk, as ``Store.place`` finds room.
        """
        lasting = [
            known
            for known in engine.routines
            if known.settled or not self.rules.recompute or self._follows_given(known)
        ]
        arena_bytes = max(
            (known.program.plan.predicted.arena_bytes for known in lasting if known.program is not None),
            default=0,
        )
        try:
            engine.store.plan_arena(arena_bytes)
        except HostBudgetTooSmall as refusal:
            self._host_refusals += 1
            again = self.given is None and self._host_refusals <= _MOST_HOST_REFUSALS
            left_bytes = max(0, arena_bytes - refusal.missing_bytes)
            host_bytes = min(int(_HOST_SHARE * left_bytes), self.budget.host_bytes // 2)
            self.maker.budget = replace(self.budget, host_bytes=host_bytes)
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

    # -- watching ----------------------------------------------------------------------------

    def _has_grown(self, engine: Engine, routine: Routine) -> bool:
        """Whether it was planned again because more is on the device before the step than was recorded:
        gradients that accumulate, an optimizer's states, what the program made since. Where the plan has room
        for that it stays, and only foretells more.

        What is seen once does not count: a step that failed may leave its graph for a while.
        """
        program = routine.program
        if program is None or self.given is not None or routine.growths >= _MOST_GROWTHS:
            return False
        more_bytes = engine.device.allocated_bytes() - before_bytes(program.tape)
        if more_bytes <= _GROWN * program.plan.predicted.peak_device_bytes:
            return False
        more_bytes, routine.grown_bytes = min(more_bytes, routine.grown_bytes), more_bytes
        if not more_bytes:
            return False
        peak = program.plan.predicted.peak_device_bytes + more_bytes
        if peak > self.budget.device_bytes - self.maker.headroom_bytes:
            return self._plan_for_more(engine, routine, program.tape, more_bytes)
        self._take_in(routine, program, more_bytes)
        return False

    def _take_in(self, routine: Routine, program: Program, more_bytes: int) -> None:
        """Foretell ``more_bytes`` more from here on."""
        assert routine.tape is not None
        routine.grown_bytes = 0
        routine.tape = replace(routine.tape, resident_bytes=routine.tape.resident_bytes + more_bytes)
        race = race_of(routine)
        if race is not None:
            race.grow(program, more_bytes)
        else:
            program.grow(more_bytes)

    def _plan_for_more(self, engine: Engine, routine: Routine, tape: Tape, more_bytes: int) -> bool:
        """Plan for a step before which ``more_bytes`` more are there; False, and the plan stays, if there is
        no such plan."""
        routine.growths += 1
        routine.grown_bytes = 0
        tape = replace(tape, resident_bytes=tape.resident_bytes + more_bytes)
        said = "%s more than when it was recorded are on the device before this step: "
        try:
            plan = self.maker.first(tape, rough=not routine.settled)
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
        """Plan with more headroom when steps that should run undisturbed have to evict again and again.
        Now and then is cheaper than the seconds that another plan takes until it runs well."""
        reclaims, before = engine.ladder.reclaims, self._reclaims_seen
        self._reclaims_seen = reclaims
        if reclaims == before or routine.steps < _SETTLING_STEPS or not self.machine.link:
            return
        last, routine.evicted_in = routine.evicted_in, routine.laps
        if last is None or routine.evicted_in - last > _NOW_AND_THEN:
            return
        if routine.replans >= _MOST_REPLANS or self.given is not None or routine.program is None:
            return
        routine.replans += 1
        tape = routine.program.tape
        plan = self.maker.again(tape)
        if plan is None:
            routine.replans = _MOST_REPLANS  # no room for more headroom: go on with what there is
            return
        log.info(
            "holes between tensors forced %d evictions in a planned step: planned again with %s of headroom",
            reclaims - before,
            format_bytes(self.maker.headroom_bytes),
        )
        self._adopt(engine, routine, tape, plan)


def _require_room(predicted: Prediction, budget: Budget) -> None:
    """A plan that is given says beforehand what it takes off the device. What finds no place in host memory
    goes to disk, and not the other way round."""
    away_bytes = predicted.arena_bytes + predicted.spill_bytes
    over_disk_bytes = predicted.spill_bytes - budget.disk_bytes
    missing_bytes = max(over_disk_bytes, away_bytes - budget.host_bytes - budget.disk_bytes)
    if missing_bytes > 0:
        which = "disk_budget" if missing_bytes == over_disk_bytes else "host_budget or disk_budget"
        raise HostBudgetTooSmall(
            f"the plan given has {format_bytes(away_bytes)} wait off the device, and it may have "
            f"{format_bytes(budget.host_bytes)} of host memory and {format_bytes(budget.disk_bytes)} of "
            f"disk; {format_bytes(missing_bytes)} lack. Raise {which}, or leave plan= out",
            missing_bytes=missing_bytes,
        )


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
