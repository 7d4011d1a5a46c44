"""Program: a plan made ready to follow, op by op, without looking anything up twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from torchlms.core.curve import baseline_curve
from torchlms.core.drops import Drops
from torchlms.core.plan import Choice, Decision, Plan
from torchlms.core.tape import Phase, Tape, Value
from torchlms.eager.convolution import blocks_of, is_convolution
from torchlms.eager.slot import UNUSED


class Deed(IntEnum):
    """What to do with a slot; at one op, in this order."""

    UNTUCK = -1  # the op before has its results: give back what made it put them elsewhere
    SEND = 0
    DROP = 1
    RELEASE = 2
    FETCH = 3
    OPEN = 4  # a hole for the op itself
    TUCK = 5  # have the op put its results where they will not be in the way later


@dataclass(frozen=True, slots=True)
class Action:
    """Before op ``op``, do ``deed`` with the slot of ordinal ``ordinal``, if a slot has a part in it.

    It is meant for one idle stretch of the slot: autograd has asked for the value ``since`` some op, and
    not in or after op ``until``.
    """

    op: int
    deed: Deed
    ordinal: int
    decision: Decision | None = None
    since: int = UNUSED
    until: int = UNUSED + 1
    lend: bool = False  # the program may still hold it

    def suits(self, used_at: int) -> bool:
        """Whether a slot that autograd asked for last at ``used_at`` is in that stretch."""
        return self.since <= used_at < self.until


@dataclass(frozen=True, slots=True)
class Expected:
    """What the tape says of one saved storage: advice to check a running step against."""

    size_bytes: int
    saved_at: int
    needed_at: tuple[int, ...]  # where autograd asks for it after an idle stretch
    made: bool = True  # by an op of this step, and not older

    def needed_after(self, used_at: int) -> int:
        """At which op it is needed next, once it was asked for at ``used_at``."""
        return next((op for op in self.needed_at if op > used_at), 0)


_ROOMY = 0.75  # of the budget: what stays below needs no eye on running out
_LESSONS = 16
_MORE_LESSONS = 2
_DULL_LESSON = 3  # a step in which nothing new is learned counts for as many
_NO_SLOT = -1
_OBSTACLE_BYTES = 20 << 20  # smaller blocks find a place anywhere
_OBSTACLE_OPS = 64  # how long before a pinch its obstacles may have been made


@dataclass(slots=True)
class Trust:
    """What trying the recipes of a routine has shown, by the ordinal of the storage they make."""

    proven: set[int] = field(default_factory=set)
    refuted: set[int] = field(default_factory=set)
    missed: set[int] = field(default_factory=set)  # had no recipe when it was to be dropped
    failures: int = 0  # of recipes that were trusted


class Program:
    """Actions in the order of the ops that trigger them.

    The clock that triggers them is advice too: it counts ops and is set right at every storage
    that autograd saves or asks for, so a few more or fewer ops than on the tape do no harm.
    """

    def __init__(self, tape: Tape, plan: Plan, trust: Trust | None = None) -> None:
        self.trust = trust if trust is not None else Trust()
        self.tape = tape
        self.plan = plan
        decisions: dict[int, list[Decision]] = {}
        for decision in plan.moves:
            decisions.setdefault(decision.value, []).append(decision)
        saved = sorted((value for value in tape.values if value.saved >= 0), key=lambda value: value.saved)
        # Without the ordinals of storages that were let go and then saved once more: the later one counts.
        self.expected = {
            value.saved: Expected(
                value.size_bytes,
                value.saved_at,
                tuple(stretch.stop for stretch in value.idle if not stretch.touched),
                value.birth >= 0,
            )
            for value in saved
        }
        self.saves = 1 + max(self.expected, default=-1)
        actions = []
        self.told: set[int] = set()  # ops that some recipe runs again
        # Which values have to be held when an op reads them, because a recipe needs them and autograd does
        # not save them, or only later.
        self.holding: dict[int, set[int]] = {}
        self.involved: set[int] = set()  # ordinals of what some recipe makes or reads
        for value in saved:
            for decision in decisions.get(value.id, ()):
                actions += _actions(value, decision)
                if decision.choice is Choice.RECOMPUTE:
                    self.told.update(value.recipe)
                    self.involved.update(tape.values[source].saved for source in value.sources)
                    self.involved.add(value.saved)
                    self._hold_sources(value, decision.release_op)
        self.roomy_at_end = _peak_at_end(tape) <= _ROOMY * plan.budget.device_bytes
        self.drops = any(action.deed is Deed.DROP for action in actions)
        self.actions = sorted(actions, key=self._order)
        # By op, what runs there if all it needs is an eye on running out of memory; learned by the engine.
        self.quiet: list[Any] = [None] * len(tape.ops)
        self.pinches: set[int] = set()  # ops before which the allocator remapped
        self.tucked: set[int] = set()  # ops whose results stood in the way of opening a hole at a pinch
        self.lessons = _LESSONS if actions else 0  # steps left in which both are learned
        self.scattered = True  # free memory may be mapped in pieces
        self.calm = False  # the last step passed without a pinch
        self._blocks: dict[int, list[int]] | None = None

    def _hold_sources(self, dropped: Value, release_op: int) -> None:
        sources = [self.tape.values[source] for source in dropped.sources]
        late = {item.id for item in sources if item.saved < 0 or item.saved_at >= release_op}
        for op in dropped.recipe if late else ():
            held = late.intersection(self.tape.ops[op].reads)
            if held:
                self.holding.setdefault(op, set()).update(held)

    def grow(self, more_bytes: int) -> None:
        """Before the step more is there than when it was recorded, and the plan has room for it."""
        predicted = self.plan.predicted
        peak_bytes = predicted.peak_device_bytes + more_bytes
        self.tape = replace(self.tape, resident_bytes=self.tape.resident_bytes + more_bytes)
        self.plan = replace(self.plan, predicted=replace(predicted, peak_device_bytes=peak_bytes))
        self.roomy_at_end = _peak_at_end(self.tape) <= _ROOMY * self.plan.budget.device_bytes

    def leaves_out(self, op: int, name: str) -> bool:
        """Whether op ``op`` is the one that the tape has there, and no recipe runs it again."""
        ops = self.tape.ops
        return op not in self.told and op < len(ops) and ops[op].name == name

    def judge(self, ordinal: int, *, same: bool) -> None:
        """A recipe has been tried."""
        (self.trust.proven if same else self.trust.refuted).add(ordinal)

    def fail(self, ordinal: int) -> None:
        """A recipe that was trusted cannot be carried out. The second time none is trusted any more: the
        program does something that is not seen, and may do it to others as well."""
        self.trust.failures += 1
        failed = {ordinal}
        if self.trust.failures > 1:
            failed |= {value.saved for value in self.tape.values if value.recipe}
        self.trust.refuted |= failed
        self.trust.proven -= failed

    def miss(self, ordinal: int) -> None:
        """A value had no recipe when it was to be dropped. The second time, it is not to be dropped."""
        (self.trust.refuted if ordinal in self.trust.missed else self.trust.missed).add(ordinal)

    def learn(self, pinched: set[int], *, disturbed: bool) -> None:
        """Take note of a step in which the allocator remapped (``disturbed``) at the ops ``pinched``.

        Memory is put in order once more after the first lesson, so that holes are opened in what lies as it
        lay when their pinches were found. Not after later ones: a pinch at which no hole could be opened
        would only come back, step by step, while what a remap has left behind mostly has room for it.
        """
        first = self.lessons == _LESSONS
        again = disturbed and self.calm and not self.lessons
        if again:
            self.lessons = _MORE_LESSONS  # something else has scattered the memory
        stuck = pinched & self.pinches
        opened = pinched - self.pinches
        tucked = {op for pinch in stuck for op in self._obstacles(pinch)} - self.tucked
        fruitful = again or (disturbed and (opened or tucked))
        self.lessons = max(0, self.lessons - (1 if fruitful else _DULL_LESSON))
        self.scattered = disturbed and first
        self.calm = not disturbed
        self.pinches |= opened
        self.tucked |= tucked
        self._add(Action(op, Deed.OPEN, _NO_SLOT) for op in opened)
        self._add(
            action
            for op in tucked
            for action in (Action(op, Deed.TUCK, _NO_SLOT), Action(op + 1, Deed.UNTUCK, _NO_SLOT))
        )

    def learn_anew(self) -> None:
        """Other plans ran meanwhile: memory lies otherwise now, and the allocator may remap elsewhere."""
        self.lessons = _LESSONS if self.actions else 0
        self.scattered = True
        self.calm = False

    def _add(self, actions: Iterable[Action]) -> None:
        self.actions = sorted([*self.actions, *actions], key=self._order)

    def _obstacles(self, pinch: int) -> list[int]:
        """The ops that made, not long before, what is in use or in flight at ``pinch``."""
        return [
            value.birth
            for value in self.tape.values
            if pinch - _OBSTACLE_OPS <= value.birth < pinch <= value.death
            and value.size_bytes >= _OBSTACLE_BYTES
            and not any(stretch.free_from <= pinch < stretch.stop for stretch in value.idle)
        ]

    def blocks_bytes(self, op: int) -> list[int]:
        """What is allocated at op ``op``, as far as the tape knows: what is made again before it, and
        its own results and workspace."""
        if not 0 <= op < len(self.tape.ops):
            return []
        if self._blocks is None:
            self._blocks = self._all_blocks()
        return self._blocks.get(op, [])

    def _all_blocks(self) -> dict[int, list[int]]:
        made: dict[int, list[int]] = {}
        for value in self.tape.values:
            made.setdefault(value.birth, []).append(value.size_bytes)
        for op, known in enumerate(self.tape.ops):
            results = made.get(op, [])
            # As it is reserved before a convolution, or the hole would be too small for that.
            blocks_bytes = blocks_of if is_convolution(known.name) else _as_told
            made[op] = list(blocks_bytes(results, known.scratch_bytes))
        blocks: dict[int, list[int]] = {}
        back = {move.value: move.reload_op for move in self.plan.moves if move.choice is Choice.RECOMPUTE}
        for value in Drops.of(self.tape, self.plan.moves).through:
            for op in value.recipe:
                blocks.setdefault(back[value.id], []).extend(made.get(op, ()))
        for op, own in made.items():
            blocks.setdefault(op, []).extend(own)
        return blocks

    def _order(self, action: Action) -> tuple[int, int, int]:
        """By op and deed; sends in order of value id, fetches in order of need."""
        if action.decision is None:
            return action.op, action.deed, 0
        if action.deed is Deed.FETCH:
            value = self.tape.values[action.decision.value]
            return action.op, action.deed, value.idle[action.decision.stretch].stop
        return action.op, action.deed, action.decision.value


def _actions(value: Value, decision: Decision) -> list[Action]:
    """What is to be done with ``value`` in one of its idle stretches."""
    stretch = value.idle[decision.stretch]
    asked = [earlier.stop for earlier in value.idle[: decision.stretch] if not earlier.touched]
    since, until = (asked[-1], stretch.stop) if asked else (UNUSED, UNUSED + 1)
    lend = stretch.free_from > stretch.start

    def act(op: int, deed: Deed) -> Action:
        return Action(op, deed, value.saved, decision, since, until, lend)

    if decision.choice is Choice.RECOMPUTE:
        return [act(decision.release_op, Deed.DROP)]
    return [
        act(stretch.start, Deed.SEND),
        act(decision.release_op, Deed.RELEASE),
        act(decision.reload_op, Deed.FETCH),
    ]


def _as_told(results_bytes: Sequence[int], scratch_bytes: int) -> tuple[int, ...]:
    return (*results_bytes, scratch_bytes)


def _peak_at_end(tape: Tape) -> int:
    """The most memory in use after the backward pass, while the optimizer works."""
    curve = baseline_curve(tape)
    return max(
        (int(curve[index]) for index, op in enumerate(tape.ops) if op.phase is Phase.BETWEEN), default=0
    )
