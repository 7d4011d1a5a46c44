"""Records to JSON and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import strategies
from hypothesis import given, settings
from tapes import GIB, chain, gpu, unet

from torchlms.core.machine import Machine
from torchlms.core.plan import Budget, Plan
from torchlms.core.planner import plan
from torchlms.core.record import from_json, to_json
from torchlms.core.tape import Tape
from torchlms.errors import PlanMismatch

if TYPE_CHECKING:
    from pathlib import Path


def test_files_round_trip(tmp_path: Path) -> None:
    tape, machine = unet(), gpu()
    made = plan(tape, machine, Budget(3 * GIB, 1 * GIB, 8 * GIB))
    assert made.moves
    for record in (tape, machine, made):
        record.save(tmp_path / "record.json")
        assert type(record).load(tmp_path / "record.json") == record


@settings(max_examples=50, deadline=None)
@given(strategies.tapes(wrapping=True))
def test_tapes_round_trip(tape: Tape) -> None:
    again = from_json(Tape, to_json(tape))
    assert again == tape
    assert again.fingerprint == tape.fingerprint


@settings(max_examples=50, deadline=None)
@given(strategies.machines())
def test_machines_round_trip(machine: Machine) -> None:
    assert from_json(Machine, to_json(machine)) == machine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a plan file: it holds no record of torchlms"),
        ('{"schema": "torchlms.run/1"}', "is not a plan file: it holds a torchlms.run/1"),
        ("{", "is not JSON"),
        ('{"schema": "torchlms.plan/9"}', "has schema 'torchlms.plan/9'"),
        ('{"schema": "torchlms.plan/1"}', "is not a complete plan file"),
        ('{"schema": "torchlms.plan/1", "colour": 3}', "unknown field 'colour'"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanMismatch, match=message):
        Plan.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanMismatch, match="cannot read tape file"):
        Tape.load(tmp_path / "none.json")


def test_the_fingerprint_names_the_computation_not_its_times() -> None:
    assert chain(time_s=1.0).fingerprint == chain(time_s=2.0).fingerprint
    assert chain(4).fingerprint != chain(5).fingerprint
    assert chain(size_bytes=512).fingerprint != chain(size_bytes=1024).fingerprint
