"""Routines: the kinds of micro-step met so far, and which of them is the usual one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torchlms.eager.routine import Routine, Signature, Verdict

if TYPE_CHECKING:
    from torchlms.core.plan import Plan
    from torchlms.core.tape import Tape
    from torchlms.eager.program import Program

log = logging.getLogger("torchlms")

_MOST_ROUTINES = 32


class Routines:
    """Every routine by its signature, the one met last at the end."""

    def __init__(self) -> None:
        self._known: dict[Signature, Routine] = {}
        self._wasted = 0  # that were forgotten before they came for the second time

    def __iter__(self) -> Iterator[Routine]:
        return iter(self._known.values())

    def of(self, signature: Signature) -> Routine:
        """The routine of ``signature``, new if need be; the ones met longest ago are forgotten. Where many of
        these were recorded for nothing, a new one waits for its second time."""
        routine = self._known.pop(signature, None)
        if routine is None:
            routine = Routine(signature)
            if self._wasted >= _MOST_ROUTINES:
                routine.wait_for_another()
        self._known[signature] = routine
        if len(self._known) > _MOST_ROUTINES:
            self._forget(self._known.pop(next(iter(self._known))))
        return routine

    def _forget(self, routine: Routine) -> None:
        self._wasted = 0 if routine.laps else self._wasted + 1
        if self._wasted == _MOST_ROUTINES:
            log.warning(
                "%d kinds of step came and went without coming again: from here on a new one is recorded "
                "when it comes for the second time, and until then values leave as memory runs out, slowly",
                _MOST_ROUTINES,
            )

    def usual(self) -> Routine | None:
        """The routine that most steps follow: of those with a tape the one met last, if it has taken the
        place of all others, else the one that was followed most."""
        known = [routine for routine in reversed(self._known.values()) if routine.tape is not None]
        if known and known[0].laps and all(other.met_last < known[0].met_first for other in known[1:]):
            return known[0]
        return max(known, key=lambda routine: routine.laps, default=None)

    def usual_tape(self) -> Tape | None:
        usual = self.usual()
        if usual is not None and usual.program is not None:
            return usual.program.tape  # with the times by which its plan is judged
        return usual.tape if usual is not None else None

    def usual_plan(self) -> Plan | None:
        usual = self.usual()
        return usual.program.plan if usual is not None and usual.program is not None else None

    def programs(self) -> list[Program]:
        return [routine.program for routine in self if routine.program is not None]

    def plans(self) -> list[Plan]:
        return [program.plan for program in self.programs()]

    def all_fit(self) -> bool:
        """Whether every routine met so far needs nothing moved."""
        known = [routine for routine in self if routine.recordings]
        return bool(known) and all(routine.verdict is Verdict.FITS for routine in known)

    def rise_bytes(self) -> int:
        """How much more memory the largest of them takes than there is before it."""
        return max((routine.rise_bytes for routine in self), default=0)

    def improvises(self) -> bool:
        """Whether the routine met last runs without a plan, for it has none."""
        last = next(reversed(self._known.values()), None)
        return last is not None and last.verdict is Verdict.IMPROVISE

    def doubt(self) -> None:
        """Record every routine again."""
        for routine in self:
            routine.doubt()

    def plan_again(self) -> None:
        """Have every routine planned anew when it comes next, from the tape that it has."""
        for routine in self:
            routine.reconsider()
