"""Known times: ops take what their names say, and steps what was predicted of them.

What a plan looks like then depends on the network alone, and not on what else this computer has to do:
a test that needs a certain value to be dropped gets it dropped on every machine.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from torchlms.core.pace import lap_s
from torchlms.eager.recorder import Recorder
from torchlms.eager.timer import Lap, OpTimer
from torchlms.referee import Referee

if TYPE_CHECKING:
    import pytest

    from torchlms.core.tape import Tape
    from torchlms.eager.engine import Engine
    from torchlms.eager.routine import Routine

# The times that were measured after all: other plans in each run, and other races between them.
REAL = "TORCHLMS_TESTS_REAL_TIMES"

OP_S = 1e-5
HEAVY_OP_S = 2e-4
_HEAVY = ("mm", "conv", "attention", "bilinear", "linear")


def op_s(name: str) -> float:
    """As if large products were what takes long, as they do."""
    return HEAVY_OP_S if any(part in name for part in _HEAVY) else OP_S


def know_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the recording, for the steps whose ops are timed, and for the laps of races."""
    if os.environ.get(REAL):
        return
    finish, times, note = Recorder.finish, OpTimer.times, Referee.note
    now_s = 0.0

    def finished(self: Recorder, *, model: str = "") -> Tape:
        tape = finish(self, model=model)
        return replace(tape, ops=tuple(replace(op, time_s=op_s(op.name)) for op in tape.ops))

    def timed(self: OpTimer) -> list[tuple[str, float]]:
        return [(name, op_s(name)) for name, _ in times(self)]

    def noted(self: Referee, engine: Engine, routine: Routine) -> None:
        nonlocal now_s
        if routine.tape is not None and routine.program is not None:
            now_s = lap_s(routine.tape, routine.program.plan.predicted.step_s)
        note(self, engine, routine)

    monkeypatch.setattr(Recorder, "finish", finished)
    monkeypatch.setattr(OpTimer, "times", timed)
    monkeypatch.setattr(Referee, "note", noted)
    monkeypatch.setattr(Lap, "seconds", property(lambda self: None if self._end is None else now_s))
