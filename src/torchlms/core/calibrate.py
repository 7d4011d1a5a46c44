"""Calibrate: what would explain the time that a step has really taken.

First what the ops take in a device that has run for a while (``heat``): one that was timed after a pause
keeps a higher clock for some steps than it can keep for long. Where the allocator remaps memory in each
step, for a large result that finds no hole, the device waits for that. Where the device kept catching up
with the program, it is the program, in Python, that takes so long. Else the copies: a link is shared with
others. Where no speed of the copies explains it, the ops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchlms.core.again import with_drops
from torchlms.core.drops import Drops
from torchlms.core.pace import Load, Pace, lap_s, paced
from torchlms.core.plan import Choice
from torchlms.core.simulate import Simulator
from torchlms.core.tape import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchlms.core.machine import Machine
    from torchlms.core.plan import Plan, Prediction
    from torchlms.core.tape import Tape

FASTEST, SLOWEST = 2.0, 0.25  # times the measured rates: beyond that something else is the matter
LEAST, MOST = 0.5, 2.0  # times the measured op times: likewise
_ALIKE = 0.02  # off by less is explained
_HALVINGS = 12


@dataclass(frozen=True, slots=True)
class Rates:
    """Corrections: ops take ``ops`` times as long as was measured, copies are ``copies`` times as fast, the
    program has a ``pace`` at which it calls them, and remapping takes ``remaps_s`` of each step."""

    ops: float = 1.0
    copies: float = 1.0
    pace: Pace | None = None
    remaps_s: float = 0.0

    def __str__(self) -> str:
        ops = f"ops taken to be {self.ops:.2f} times as long" if self.ops != 1.0 else ""
        copies = f"copies taken to be {self.copies:.2f} times as fast" if self.copies != 1.0 else ""
        program = str(self.pace) if self.pace is not None else ""
        remaps = f"remapping memory taken to need {self.remaps_s * 1e3:.1f} ms" if self.remaps_s else ""
        return " and ".join(filter(None, (ops, copies, program, remaps))) or "all as it was measured"


AS_MEASURED = Rates()


def stretched(tape: Tape, factor: float) -> Tape:
    """``tape`` if the ops of forward and backward took ``factor`` times as long."""
    if factor == 1.0:
        return tape
    return replace(
        tape,
        ops=tuple(
            op if op.phase is Phase.BETWEEN else replace(op, time_s=op.time_s * factor) for op in tape.ops
        ),
    )


def foretold(tape: Tape, machine: Machine, plan: Plan, rates: Rates = AS_MEASURED) -> Prediction:
    """What ``plan`` predicts, with the times that follow from ``rates``."""
    moves = [move for move in plan.moves if move.choice in (Choice.HOST, Choice.DISK)]
    changed = with_drops(stretched(tape, rates.ops), Drops.of(tape, plan.moves))
    timeline = Simulator(changed, machine.with_copies(rates.copies)).run(moves)
    predicted = replace(
        plan.predicted,
        step_s=timeline.step_s + rates.remaps_s,
        compute_s=timeline.compute_s,
        stall_s=timeline.stall_s + rates.remaps_s,
    )
    return paced(predicted, tape, rates.pace, Load.of(tape, plan.moves))


def heat(tape: Tape, times: Sequence[tuple[str, float]]) -> float:
    """How many times as long as on ``tape`` the ops of forward and backward took in ``times`` (names and
    seconds), half of them by time more and half less: some may have waited for memory. 1 if they are not the
    same ops."""
    expected = [op for op in tape.ops if op.phase is not Phase.BETWEEN]
    found = times[: len(expected)]
    if [op.name for op in expected] != [name for name, _ in found]:
        return 1.0
    ratios = sorted(
        (seconds / op.time_s, op.time_s)
        for op, (_, seconds) in zip(expected, found, strict=True)
        if op.time_s
    )
    left_s = sum(op_s for _, op_s in ratios) / 2
    for ratio, op_s in ratios:
        left_s -= op_s
        if left_s <= 0:
            return min(max(ratio, LEAST), MOST)
    return 1.0


def explanation(
    tape: Tape,
    machine: Machine,
    plan: Plan,
    measured_lap_s: float,
    *,
    spent_s: tuple[float, float] | None = None,
    remaps: bool = False,
) -> Rates:
    """The rates with which the simulator comes nearest to the time measured for a lap under ``plan``.
    ``remaps``: the allocator remapped in each lap. ``spent_s``: what the program took for values that leave,
    and for ops that make some of them again, if the device kept waiting for that."""

    def predicted_s(rates: Rates) -> float:
        return lap_s(tape, foretold(tape, machine, plan, rates).step_s)

    as_measured = foretold(tape, machine, plan)
    as_measured_s = lap_s(tape, as_measured.step_s)
    if abs(measured_lap_s / as_measured_s - 1) < _ALIKE:
        return AS_MEASURED
    if remaps and measured_lap_s > as_measured_s:
        return Rates(remaps_s=measured_lap_s - as_measured_s)
    if spent_s is not None and measured_lap_s > as_measured_s:
        return Rates(pace=_pace(measured_lap_s, spent_s, Load.of(tape, plan.moves)))
    unhindered_s = lap_s(tape, as_measured.compute_s)
    if unhindered_s < measured_lap_s < predicted_s(Rates(copies=SLOWEST)):
        slower = _where(
            lambda factor: predicted_s(Rates(copies=1 / factor)), measured_lap_s, 1 / FASTEST, 1 / SLOWEST
        )
        return Rates(copies=1 / slower)
    return Rates(ops=_where(lambda factor: predicted_s(Rates(ops=factor)), measured_lap_s, LEAST, MOST))


def _pace(measured_lap_s: float, spent_s: tuple[float, float], load: Load) -> Pace:
    values_s, again_s = spent_s
    return Pace(
        measured_lap_s - values_s - again_s,
        values_s / max(load.leaving, 1),
        again_s / max(load.again, 1),
    )


def _where(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where, between ``low`` and ``high``, a function that rises comes nearest to ``wanted``."""
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if rising(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5
