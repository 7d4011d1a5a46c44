"""Program: a plan made ready to follow, op by op, without looking anything up twice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torchlms.core.plan import Choice, Decision, Plan
from torchlms.core.tape import Tape


class Deed(IntEnum):
    """What to do with a slot; at one op, in this order."""

    SEND = 0
    RELEASE = 1
    FETCH = 2


@dataclass(frozen=True, slots=True)
class Action:
    """Before op ``op``, do ``deed`` with the slot of ordinal ``ordinal``."""

    op: int
    deed: Deed
    ordinal: int


@dataclass(frozen=True, slots=True)
class Expected:
    """What the tape says of one saved storage: advice to check a running step against."""

    size_bytes: int
    saved_at: int
    needed_at: int
    decision: Decision | None


class Program:
    """Actions in the order of the ops that trigger them.

    The clock that triggers them is advice too: it counts ops and is set right at every storage
    that autograd saves or asks for, so a few more or fewer ops than on the tape do no harm.
    """

    def __init__(self, tape: Tape, plan: Plan) -> None:
        self.tape = tape
        self.plan = plan
        decisions = {decision.value: decision for decision in plan.moves}
        saved = sorted((value for value in tape.values if value.saved >= 0), key=lambda value: value.saved)
        self.expected = [
            Expected(
                value.size_bytes,
                value.saved_at,
                value.idle[0].stop if value.idle else -1,
                decisions.get(value.id),
            )
            for value in saved
        ]
        actions = []
        for value in saved:
            decision = decisions.get(value.id)
            if decision is None or decision.choice not in (Choice.HOST, Choice.DISK):
                continue
            start = value.idle[decision.stretch].start
            actions.append(Action(start, Deed.SEND, value.saved))
            actions.append(Action(decision.release_op, Deed.RELEASE, value.saved))
            actions.append(Action(decision.reload_op, Deed.FETCH, value.saved))
        self.actions = sorted(actions, key=lambda action: (action.op, action.deed, self._order(action)))

    def _order(self, action: Action) -> int:
        """Sends in order of value id; fetches in order of need."""
        expected = self.expected[action.ordinal]
        if action.deed is Deed.FETCH:
            return expected.needed_at
        return expected.decision.value if expected.decision is not None else 0
