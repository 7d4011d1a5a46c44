"""Follower: carries out a program's actions as the clock of ops passes them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torchlms.core.plan import Choice
from torchlms.eager.program import Action, Deed, Program
from torchlms.eager.slot import Slot, Where
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall, SpillError

if TYPE_CHECKING:
    from torchlms.eager.holes import Holes
    from torchlms.eager.provenance import Provenance
    from torchlms.eager.recipe import Recipe
    from torchlms.memory.store import Place, Store

NEVER = 1 << 62  # no action is due before this op


class Follower:
    """One micro-step under one program. ``due`` is the op before which there is something to do.

    A plan is advice: what has no room now stays where it is, and whoever needs it asks again.
    """

    __slots__ = ("_cursor", "_holes", "_prove", "_provenance", "_slots", "_store", "due", "program")

    def __init__(
        self,
        program: Program,
        slots: Mapping[int, weakref.ref[Slot]],
        store: Store,
        holes: Holes,
        provenance: Provenance | None = None,
        prove: Callable[[Slot, Recipe], bool | None] = lambda slot, recipe: None,
    ) -> None:
        self._provenance = provenance
        self._prove = prove
        self.program = program
        self._slots = slots  # by ordinal, filled as the step goes
        self._store = store
        self._holes = holes
        self._cursor = 0
        self.due = program.actions[0].op if program.actions else NEVER

    def catch_up(self, clock: int) -> None:
        """Carry out every action that is due before op ``clock``."""
        actions = self.program.actions
        while self._cursor < len(actions) and actions[self._cursor].op <= clock:
            action = actions[self._cursor]
            self._cursor += 1
            reference = self._slots.get(action.ordinal)
            slot = reference() if reference is not None else None
            if slot is not None:
                with contextlib.suppress(BudgetTooSmall, HostBudgetTooSmall, SpillError):
                    self._carry_out(action, slot)
            elif action.ordinal < 0:
                self._make_place(action)
        self.due = actions[self._cursor].op if self._cursor < len(actions) else NEVER

    def _make_place(self, action: Action) -> None:
        if action.deed is Deed.UNTUCK:
            self._holes.untuck()
            return
        blocks_bytes = self.program.blocks_bytes(action.op)
        if action.deed is Deed.OPEN:
            self._holes.open(blocks_bytes)
        else:
            self._holes.tuck(blocks_bytes)

    def _carry_out(self, action: Action, slot: Slot) -> None:
        if action.deed is Deed.SEND:
            self._send(action, slot)
        elif action.deed is Deed.DROP:
            self._drop(action, slot)
        elif action.deed is Deed.RELEASE:
            self._send(action, slot)  # if it could not go earlier
            if slot.place is not None and slot.where is Where.HELD:
                slot.release()
        elif slot.where is Where.AWAY and action.suits(slot.used_at):
            self._fetch(action, slot)

    def _drop(self, action: Action, slot: Slot) -> None:
        """Let go of what can be made again, once that has been tried. What cannot is moved instead."""
        if self._provenance is None or slot.place is not None:
            return
        if not action.suits(slot.used_at) or not slot.alone():
            return
        recipe = self._provenance.recipe(slot)
        if recipe is not None and self._trusted(slot, recipe):
            slot.passing = action.decision is not None and action.decision.passing
            slot.drop(recipe)
            return
        if recipe is None:
            self.program.miss(slot.ordinal)
        if slot.alone():  # and not evicted while it was tried
            slot.send(self._store.place(slot.size_bytes))
            slot.release()

    def _trusted(self, slot: Slot, recipe: Recipe) -> bool:
        """Whether ``recipe`` has given the right bytes, now or in an earlier step."""
        trust = self.program.trust
        if slot.ordinal not in trust.proven and slot.ordinal not in trust.refuted:
            same = self._prove(slot, recipe)
            if same is not None:
                self.program.judge(slot.ordinal, same=same)
        return slot.ordinal in trust.proven

    def _send(self, action: Action, slot: Slot) -> None:
        decision = action.decision
        if decision is None or slot.place is not None or not action.suits(slot.used_at):
            return
        if not slot.alone():
            if not (action.lend and slot.lendable()):
                return
            slot.lend()
        place: Place | None = None
        if decision.choice is Choice.HOST:
            place = self._store.place_planned(decision.offset_bytes, slot.size_bytes)
        elif decision.choice is Choice.DISK:
            place = self._store.place_on_disk(slot.size_bytes)
        slot.send(place if place is not None else self._store.place(slot.size_bytes))

    def _fetch(self, action: Action, slot: Slot) -> None:
        if action.op in self.program.pinches:
            self._holes.open((slot.size_bytes,))
        try:
            slot.fetch(early=True)
        finally:
            if self._holes.learning:
                self._holes.note(action.op)
