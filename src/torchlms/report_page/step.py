"""Step: the planned step of a run, as the simulator plays it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchlms.core.again import with_drops
from torchlms.core.curve import baseline_curve
from torchlms.core.drops import Drops
from torchlms.core.plan import Choice
from torchlms.core.rules import Rules, stayers
from torchlms.core.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchlms.core.curve import Bytes
    from torchlms.core.machine import Machine
    from torchlms.core.plan import Decision
    from torchlms.core.simulate import Timeline
    from torchlms.core.tape import Tape
    from torchlms.report_page.run import Run


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step under its plan. ``tape`` is the recorded one with what is dropped as two values each (see
    ``core/drops.py``): its ops are those of the recording, values made again come after the recorded ones.

    ``plain_bytes`` is the memory at each op with nothing moved, ``plain_s`` the sum of the op times.
    ``ruled`` are the values that a rule keeps, by id, each with that rule; below ``least_bytes`` nothing
    leaves unless it must.
    """

    recorded: Tape
    tape: Tape
    moves: tuple[Decision, ...]
    drops: tuple[Decision, ...]
    timeline: Timeline
    plain_bytes: Bytes
    plain_s: float
    machine: Machine
    ruled: Mapping[int, str]
    least_bytes: int

    @property
    def choices(self) -> dict[int, Choice]:
        """What becomes of each value that does not stay, by id; of a value on ``tape`` that was made again,
        too."""
        chosen = {move.value: move.choice for move in self.moves}
        chosen |= {drop.value: Choice.RECOMPUTE for drop in self.drops}
        again = range(len(self.recorded.values), len(self.tape.values))
        return chosen | dict.fromkeys(again, Choice.RECOMPUTE)


def step_of(run: Run) -> Step:
    """The step of ``run`` under its plan, or with nothing moved where there is none."""
    decisions = run.plan.moves if run.plan is not None else ()
    drops = tuple(move for move in decisions if move.choice is Choice.RECOMPUTE)
    moves = tuple(move for move in decisions if move.choice is not Choice.RECOMPUTE)
    rules = Rules.read(run.options.get("rules", {}))
    tape = with_drops(run.tape, Drops.of(run.tape, drops))
    return Step(
        recorded=run.tape,
        tape=tape,
        moves=moves,
        drops=drops,
        timeline=simulate(tape, run.machine, moves),
        plain_bytes=baseline_curve(run.tape),
        plain_s=sum(op.time_s for op in run.tape.ops),
        machine=run.machine,
        ruled=stayers(rules, run.tape),
        least_bytes=rules.min_bytes,
    )
