"""Saving: the record of a run from an LMS that is on, or was."""

from __future__ import annotations

import platform
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import torch

import torchlms
from torchlms.api import current
from torchlms.core.record import to_json
from torchlms.errors import NotSupported
from torchlms.report_page.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torchlms.api import LMS
    from torchlms.core.plan import Plan
    from torchlms.core.tape import Tape

    Write = Callable[[str], None]


def run_of(lms: LMS, *, state: str | None = None) -> Run:
    """The record of what ``lms`` has done so far, with the plan that was made last and its own tape."""
    machine = lms.machine
    tape, plan = _pair(lms)
    if tape is None or machine is None:
        raise NotSupported(
            "there is no run to save: with plan=False no step is recorded"
            if not lms._options.planning
            else "there is no run to save yet: the first step has to be recorded to its end"
        )
    engine = lms._engine
    return Run(
        tape=tape if tape.model else replace(tape, model=lms._model_name()),
        machine=machine,
        plan=plan,
        stats=lms.stats() | ({} if state is None else {"state": state}),
        steps_s=tuple(engine.step_times_s) if engine is not None else (),
        options={"rules": to_json(lms._options.rules), "verify_every": lms._options.verify_every},
        versions={
            "torchlms": torchlms.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": str(torch.version.cuda or ""),
        },
        written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _pair(lms: LMS) -> tuple[Tape | None, Plan | None]:
    """A plan with the tape that it was made for. The tape recorded last may be of another kind of step."""
    programs = lms._engine.routines.programs() if lms._engine is not None else []
    if programs:
        return programs[-1].tape, programs[-1].plan
    return lms.tape, None


class Onlooker:
    """A ``write`` that also notes the LMS that is on while something is written.

    That is how the record of a benchmark is had without the benchmark knowing of it: what is measured
    runs as it does without.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._lms: LMS | None = None
        self._state: str | None = None

    def __call__(self, line: str) -> None:
        lms = current()
        if lms is not None:
            self._lms, self._state = lms, lms.state
        self._write(line)

    def save(self, path: Path) -> None:
        """Raises NotSupported if no LMS was on."""
        if self._lms is None:
            raise NotSupported("no run to save: LMS was not on")
        run_of(self._lms, state=self._state).save(path)
