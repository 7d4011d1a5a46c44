"""Record: what is kept of a run, enough to draw it anywhere: tape, machine, plan and figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlms.core.machine import Machine
from torchlms.core.plan import Plan
from torchlms.core.record import from_json, to_json
from torchlms.core.tape import Tape
from torchlms.errors import NotSupported, PlanMismatch

if TYPE_CHECKING:
    from torchlms.api import LMS

SCHEMA = "torchlms.run/1"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """``stats`` are those of ``LMS.stats()`` at the end of the run."""

    tape: Tape
    machine: Machine
    plan: Plan
    stats: dict[str, Any]

    def save(self, path: str | Path) -> None:
        text = {
            "schema": SCHEMA,
            "tape": to_json(self.tape),
            "machine": to_json(self.machine),
            "plan": to_json(self.plan),
            "stats": self.stats,
        }
        Path(path).write_text(json.dumps(text))

    @staticmethod
    def load(path: str | Path) -> RunRecord:
        """PlanMismatch for a file that is none, or of another schema."""
        try:
            found = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise PlanMismatch(f"{path} cannot be read as the record of a run: {error}") from None
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise PlanMismatch(
                f"{path} is no record of a run (schema {schema!r}, wanted {SCHEMA!r}): write one with "
                "torchlms run --save-run FILE, or torchlms.report_page.save_run(lms, FILE)"
            )
        return RunRecord(
            from_json(Tape, found["tape"]),
            from_json(Machine, found["machine"]),
            from_json(Plan, found["plan"]),
            found["stats"],
        )


def save_run(lms: LMS, path: str | Path) -> None:
    """Write the record of what ``lms`` did so far. NotSupported before there is a plan."""
    tape, machine, plan = lms.tape, lms.machine, lms.plan
    if tape is None or machine is None or plan is None:
        raise NotSupported("there is no plan yet: a run can be saved from the second step on")
    RunRecord(tape, machine, plan, lms.stats()).save(path)
