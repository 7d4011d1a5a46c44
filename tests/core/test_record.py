"""Records to JSON and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import strategies
from hypothesis import given, settings
from tapes import GIB, chain, gpu, unet

from torchlms.core.machine import Machine
from torchlms.core.plan import Budget, Plan, Prediction
from torchlms.core.planner import plan
from torchlms.core.record import from_json, to_json
from torchlms.core.tape import Kind, Phase, Tape
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
        ("[" * 100_000, "is not JSON"),
        ('{"schema": "torchlms.plan/9"}', "has schema 'torchlms.plan/9'"),
        ('{"schema": "torchlms.plan/2"}', "is not a complete plan file"),
        ('{"schema": "torchlms.plan/2", "colour": 3}', "unknown field 'colour'"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanMismatch, match=message):
        Plan.load(path)


@pytest.mark.parametrize(
    ("field", "wrong", "words"),
    [
        ("value", "x", "'x' where a whole number belongs"),
        ("release_op", 1.5, "1.5 where a whole number belongs"),
        ("reload_op", True, "True where a whole number belongs"),
        ("reason", 7, "7 where a text belongs"),
        ("choice", "fly", "'fly' is not a valid Choice"),
    ],
)
def test_fields_of_another_type(tmp_path: Path, field: str, wrong: Any, words: str) -> None:
    decision = {"value": 0, "stretch": 0, "choice": "host", field: wrong}
    plan = Plan("", "", "cpu", Budget(1, 1, 1), (), Prediction(1, 0, 1, 1.0, 0.0))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(to_json(plan) | {"decisions": [decision]}))
    with pytest.raises(PlanMismatch, match=words):
        Plan.load(path)


def test_the_record_of_a_run_holds_its_tape(tmp_path: Path) -> None:
    tape = chain()
    (tmp_path / "run.json").write_text(json.dumps({"schema": "torchlms.run/1", "tape": to_json(tape)}))
    assert Tape.load(tmp_path / "run.json") == tape
    with pytest.raises(PlanMismatch, match=r"is not a plan file: it holds a torchlms.run/1"):
        Plan.load(tmp_path / "run.json")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanMismatch, match="cannot read tape file"):
        Tape.load(tmp_path / "none.json")


def test_the_fingerprint_names_the_computation_not_its_times() -> None:
    assert chain(time_s=1.0).fingerprint == chain(time_s=2.0).fingerprint
    assert chain(4).fingerprint != chain(5).fingerprint
    assert chain(size_bytes=512).fingerprint != chain(size_bytes=1024).fingerprint


def test_the_fingerprint_sees_what_autograd_did_not_save() -> None:
    """Twice as wide a layer for half of the batch: what is saved is as large."""
    tape = unet()
    touched = {value for op in tape.ops if op.phase is not Phase.BETWEEN for value in (*op.reads, *op.writes)}
    value = next(value for value in tape.values if value.saved < 0 and value.id in touched)
    values = tuple(
        replace(one, size_bytes=2 * one.size_bytes) if one is value else one for one in tape.values
    )
    assert replace(tape, values=values).fingerprint != tape.fingerprint


def test_the_fingerprint_does_not_see_how_large_a_data_set_is() -> None:
    """Where the batch is a view, its storage is that of all the data."""
    tape = chain()
    (given,) = [value for value in tape.values if value.kind is Kind.INPUT][:1] or [tape.values[0]]
    given = replace(given, kind=Kind.INPUT, birth=-1, death=len(tape.ops), saved=-1, idle=())
    values = [given if value.id == given.id else value for value in tape.values]
    larger = [replace(value, size_bytes=9 << 20) if value.id == given.id else value for value in values]
    prints = [replace(tape, values=tuple(some)).fingerprint for some in (values, larger)]
    assert prints[0] == prints[1]
