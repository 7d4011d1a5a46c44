"""Referee: times the plan of each routine, then others that may be faster, and keeps the fastest."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from torchlms.core.calibrate import explanation, foretold, heat, stretched
from torchlms.core.pace import lap_s
from torchlms.eager.program import Program
from torchlms.race import CLOSE, Contender, Race

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeGuard

    from torchlms.core.calibrate import Rates
    from torchlms.core.plan import Plan
    from torchlms.core.tape import Tape
    from torchlms.eager.engine import Engine
    from torchlms.eager.routine import Routine
    from torchlms.maker import Maker

log = logging.getLogger("torchlms")

_MOST_CALIBRATIONS = 2
_AS_PREDICTED = 0.07  # off by less is as good as predicted: nothing is tried for it
_AS_SHOWN = 0.02  # what stays foretells what its laps have shown, if they are off by more
_ROOMIER = 0.05  # of the budget, for a contender
_UNPINCHED = 0.01  # off by more may be what closing holes costs, where there are any
_MOVES_ONLY = "moving alone"


class Follow(Protocol):
    """Has a routine follow a program, perhaps without a word."""

    def __call__(
        self, engine: Engine, routine: Routine, program: Program, *, quietly: bool = False
    ) -> None: ...


class Referee:
    """The races of one director's routines.

    ``follow`` lets a contender run, ``settled`` is called when a race is over.
    """

    def __init__(self, maker: Maker, follow: Follow, settled: Callable[[], None]) -> None:
        self._maker = maker
        self._follow = follow
        self._settled = settled

    def note(self, engine: Engine, routine: Routine) -> None:
        """A step of the routine is over: take its time, and have another plan run if it is time for that."""
        lap, routine.lap = routine.lap, None
        program, race = routine.program, race_of(routine)
        routine.wants_lap = race is None or not race.over
        if lap is None or program is None or (race is not None and race.over):
            return
        if not program.plan.moves and race is None:
            return
        if race is None or program.plan is not race.running.plan:
            # The first plan, or one that was made anew meanwhile, without recipes that proved wrong.
            race = routine.notes = Race([Contender(program.plan, "the plan made")])
        learning = engine.device.is_cuda and program.lessons and not program.calm
        if learning or self._feel_heat(routine, program, race):
            return
        race.running.program = program
        race.running.ran(lap, remapped=bool(program.pinches) and not program.calm)
        if race.running.done and not self._ask_heat(routine, race):
            self._next_contender(engine, routine, race)

    # -- the heat of a device that has run for a while ---------------------------------------

    def _ask_heat(self, routine: Routine, race: Race) -> bool:
        """Have the ops timed once more, now that the device has run for a while; False if that was done, or
        nothing asks for it."""
        assert routine.tape is not None
        if race.felt_heat or not _off(routine.tape, race.running):
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
        predicted = foretold(routine.tape, self._maker.machine, program.plan)
        race.running.plan = program.plan = replace(program.plan, predicted=predicted)
        log.info(
            "in a device that has run for a while ops take %.2f times as long: step %.1f ms predicted",
            factor,
            predicted.step_s * 1e3,
        )
        return True

    # -- contenders --------------------------------------------------------------------------

    def _next_contender(self, engine: Engine, routine: Routine, race: Race) -> None:
        tape = routine.tape
        assert tape is not None
        contender = self._contender(tape, race) if not race.confirming else None
        if contender is not None:
            race.contenders.append(contender)
            told = stretched(tape, contender.rates.ops)
            self._follow(engine, routine, Program(told, contender.plan, routine.trust), quietly=True)
            return
        if len(race.contenders) > 1:
            log.info("%s", race.result())
        winner = race.winner()
        ran_last, race.contenders = race.running, [winner]
        race.over = race.confirming or not _off(tape, winner)
        race.confirming = not race.over
        assert winner.program is not None
        if race.over:
            self._correct(tape, winner)
            winner.program.plan = winner.plan
            winner.program.tape = stretched(tape, winner.rates.ops)
        else:  # the machine may have been busy with something else, and nothing is to be learned of that
            winner.forget_laps()
        if winner is not ran_last:
            winner.program.learn_anew()
            self._follow(engine, routine, winner.program)
        if race.over:
            self._settled()

    def _contender(self, tape: Tape, race: Race) -> Contender | None:
        """A plan that was not tried yet and might be faster than the best so far; None ends the race."""
        maker, best, first = self._maker, race.winner(), race.first
        predicted_s = lap_s(tape, foretold(tape, maker.machine, best.plan, race.rates).step_s)
        pinched = best.program is not None and best.program.pinches
        slower = best.median_s > (1 + (_UNPINCHED if pinched else _AS_PREDICTED)) * predicted_s
        if not race.roomier and maker.machine.link and slower and not best.starved:
            # The allocator has to close holes; a plan that leaves more free lets it be.
            race.roomier = True
            made = maker.other(tape, race.rates, first=first, like=best.plan, more_headroom=_ROOMIER)
            if _worth_a_try(made, race, tape, within_s=best.median_s):
                return Contender(made, f"with {_ROOMIER:.0%} of the budget more to spare", race.rates)
        if race.calibrations < _MOST_CALIBRATIONS and abs(best.median_s / predicted_s - 1) > _AS_PREDICTED:
            race.calibrations += 1
            race.rates = self._explanation(tape, best)
            # A program that is too slow for its device needs other drops, and not some more of the same.
            like = best.plan if race.rates.pace is None else None
            made = maker.other(tape, race.rates, first=first, like=like)
            if _worth_a_try(made, race, tape):
                return Contender(made, str(race.rates), race.rates)
        if any(contender.name == _MOVES_ONLY for contender in race.contenders):
            return None
        made = maker.other(tape, race.rates, first=first, drops=False)
        if _worth_a_try(made, race, tape, within_s=CLOSE * best.median_s):
            return Contender(made, _MOVES_ONLY, race.rates)
        return None

    def _explanation(self, tape: Tape, contender: Contender) -> Rates:
        """What explains the times of its laps."""
        return explanation(
            tape,
            self._maker.machine,
            contender.plan,
            contender.median_s,
            spent_s=contender.spent_s,
            remaps=contender.remapped,
        )

    def _correct(self, tape: Tape, winner: Contender) -> None:
        """Have the winner's plan predict what its steps have shown, from here on."""
        plan = winner.plan
        if not winner.done or not _off(tape, winner, _AS_SHOWN):
            return
        between_s = plan.predicted.step_s - lap_s(tape, plan.predicted.step_s)
        rates = self._explanation(tape, winner)
        log.info(
            "steps take %.1f ms and not %.1f ms as was predicted: %s from here on",
            (winner.median_s + between_s) * 1e3,
            plan.predicted.step_s * 1e3,
            rates,
        )
        winner.rates = rates
        winner.plan = replace(plan, predicted=foretold(tape, self._maker.machine, plan, rates))


def race_of(routine: Routine) -> Race | None:
    """Of the routine's plans, if they have been timed; gone with its recording."""
    return routine.notes if isinstance(routine.notes, Race) else None


def _worth_a_try(made: Plan | None, race: Race, tape: Tape, *, within_s: float = math.inf) -> TypeGuard[Plan]:
    """Whether no plan like it has run yet, and it is predicted to take no longer than that."""
    return made is not None and not race.knows(made) and lap_s(tape, made.predicted.step_s) <= within_s


def _off(tape: Tape, contender: Contender, more_than: float = _AS_PREDICTED) -> bool:
    """Whether its laps took clearly more or less than was predicted."""
    predicted_s = lap_s(tape, contender.plan.predicted.step_s)
    return abs(contender.median_s / predicted_s - 1) > more_than
