"""Maker: plans under one budget, with headroom as far as there is any."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchlms.core import joint, planner
from torchlms.core.calibrate import stretched
from torchlms.core.headroom import ELBOW, NO_ELBOW, headroom_bytes, lean_bytes, page_bytes
from torchlms.core.planned import slower
from torchlms.errors import BudgetTooSmall, LMSError

if TYPE_CHECKING:
    from torchlms.core.calibrate import Rates
    from torchlms.core.machine import Machine
    from torchlms.core.pace import Pace
    from torchlms.core.plan import Budget, Plan
    from torchlms.core.rules import Rules
    from torchlms.core.tape import Tape

# Added where the headroom that a plan leaves proves too little: a share of the budget.
_MORE_HEADROOM = 0.015
_MORE_HOST = 1.05  # of the host memory that was said to be pinned: no contender takes more
_WORTH_TRYING = 0.97  # of the step time with more headroom
# As fast as copies are taken to be while the times of the ops are rough: those go to memory that is not
# pinned, and the ops seem to take longer than they do, as if they hid more.
_ROUGH_COPIES = 0.25


class Maker:
    """What every plan of one director is made with; how much it leaves free is learned."""

    def __init__(self, *, machine: Machine, budget: Budget, rules: Rules) -> None:
        self.machine = machine
        self.budget = budget
        self.rules = rules
        self._entered_bytes = budget.device_bytes
        self._mapped_bytes = page_bytes(budget.device_bytes, drops=rules.recompute)
        self.headroom_bytes = self._usual_bytes = self._usual_for(budget)
        self._lean_tried = False

    def rebudget(self, budget: Budget) -> None:
        """Plans from here on are for ``budget``, and leave as much more free as was learned to be needed. The
        allocator keeps its pages: in less memory than they were made for they are large, and no plan is
        tried that leaves few of them free."""
        if budget.device_bytes != self.budget.device_bytes:
            learned_bytes = max(0, self.headroom_bytes - self._usual_bytes)
            self._usual_bytes = self._usual_for(budget)
            self.headroom_bytes = self._usual_bytes + learned_bytes
            self._lean_tried |= budget.device_bytes < self._entered_bytes
        self.budget = budget

    def _usual_for(self, budget: Budget) -> int:
        asked_bytes, drops = self.rules.headroom_bytes, self.rules.recompute
        return headroom_bytes(
            self.machine, budget.device_bytes, asked_bytes, drops=drops, mapped_bytes=self._mapped_bytes
        )

    def first(self, tape: Tape, *, rough: bool) -> Plan:
        """A plan with headroom, or without where there is none to have. ``rough``: the tape's times are, and
        no long search is worth its while.

        Raises BudgetTooSmall or HostBudgetTooSmall where there is no such plan.
        """
        copies = _ROUGH_COPIES if rough and self.machine.link else 1.0
        try:
            plan = self._make(tape, self.headroom_bytes, copies=copies, quick=rough)
        except BudgetTooSmall:
            return self._make(tape, 0, copies=copies, quick=rough)
        return plan if rough or self.rules.recompute else self._lean_or(plan, tape)

    def again(self, tape: Tape) -> Plan | None:
        """A plan with more headroom than the last ones; None, and all stays, where there is none."""
        before_bytes = self.headroom_bytes
        more_bytes = before_bytes + int(_MORE_HEADROOM * self.budget.device_bytes)
        self.headroom_bytes = self._usual_bytes if before_bytes < self._usual_bytes else more_bytes
        try:
            return self._make(tape, self.headroom_bytes)
        except LMSError:
            self.headroom_bytes = before_bytes
            return None

    def other(
        self,
        tape: Tape,
        rates: Rates,
        *,
        first: Plan,
        like: Plan | None = None,
        drops: bool = True,
        more_headroom: float = 0.0,
    ) -> Plan | None:
        """Another plan, for other rates or with more room: one that may drop what ``like`` drops, or, without
        ``drops``, one that only moves. It takes hardly more host memory than ``first``, with which was said
        how much will be pinned; but where other rates make drops dearer, more may move instead. None where
        there is no such plan."""
        spare_bytes = self.headroom_bytes + int(more_headroom * self.budget.device_bytes)
        free = self.rules.recompute and drops and not more_headroom
        budget = self.budget if free else self._as_said(first)
        try:
            made = self._make(
                stretched(tape, rates.ops),
                spare_bytes,
                copies=rates.copies,
                budget=budget,
                drops=drops,
                like=like,
                pace=rates.pace,
            )
        except LMSError:
            return None
        return replace(made, budget=self.budget)

    def _as_said(self, first: Plan) -> Budget:
        """The budget for a plan that is only tried."""
        if not self.machine.link:
            return self.budget
        said = first.predicted
        return replace(
            self.budget,
            host_bytes=min(self.budget.host_bytes, int(_MORE_HOST * said.arena_bytes)),
            disk_bytes=min(self.budget.disk_bytes, said.spill_bytes),
        )

    def _lean_or(self, plan: Plan, tape: Tape) -> Plan:
        """A plan with less headroom, if that might be clearly faster: evictions will tell (``again``)."""
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
        spare_bytes: int,
        *,
        copies: float = 1.0,
        budget: Budget | None = None,
        drops: bool = True,
        quick: bool = False,
        like: Plan | None = None,
        pace: Pace | None = None,
    ) -> Plan:
        """``copies``: how many times as fast as measured they are taken to be."""
        machine = self.machine.with_copies(copies)
        budget = budget if budget is not None else self.budget
        elbow = ELBOW if machine.link else NO_ELBOW
        room: dict[str, Any] = {"headroom_bytes": spare_bytes, "elbow": elbow, "copies": slower(copies)}
        if self.rules.recompute and drops:
            return joint.plan(tape, machine, budget, self.rules, quick=quick, like=like, pace=pace, **room)
        return planner.plan(tape, machine, budget, self.rules, **room)
