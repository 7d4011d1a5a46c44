"""Run: what is kept of one run. Tape, machine and plan are the records of ``core``, each with its schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchlms.core.machine import Machine
from torchlms.core.plan import Plan
from torchlms.core.record import load_record, save_record
from torchlms.core.tape import Tape

SCHEMA = "torchlms.run/1"


@dataclass(frozen=True, slots=True)
class Run:
    """One run, of one kind of step. ``plan`` is None where none was made.

    ``stats`` are those of ``LMS.stats``, empty where nothing ran. ``steps_s`` are the seconds of the last
    steps that followed the plan, ``options`` the rules that differ from their defaults and what else was
    asked for, ``versions`` those of what ran.
    """

    tape: Tape
    machine: Machine
    plan: Plan | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    steps_s: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    written: str = ""  # date, ISO 8601
    schema: str = SCHEMA

    def save(self, path: str | Path) -> None:
        save_record(self, path)

    @staticmethod
    def load(path: str | Path) -> Run:
        return load_record(Run, path, schema=SCHEMA)
