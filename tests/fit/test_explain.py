"""``torchlms plan``: plans from files, explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tapes import gpu
from test_drops import blocks
from typer.testing import CliRunner

from torchlms.cli import app
from torchlms.core.plan import Choice, Plan
from torchlms.core.validate import validate
from torchlms.errors import BudgetTooSmall


def run(folder: Path, *options: str) -> tuple[str, Plan]:
    tape, machine = blocks(8), gpu(link=5e9)
    tape.save(folder / "tape.json")
    machine.save(folder / "machine.json")
    arguments = ["plan", str(folder / "tape.json"), "--machine", str(folder / "machine.json")]
    arguments += ["--host-budget", "1TiB", "--save", str(folder / "plan.json"), *options]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    made = Plan.load(folder / "plan.json")
    assert validate(tape, made, machine) == []
    return done.output, made


def test_what_is_decided_and_why(tmp_path: Path) -> None:
    said, made = run(tmp_path, "--budget", "2GiB", "--no-recompute")
    assert {move.choice for move in made.moves} == {Choice.HOST}
    assert "of 2.0 GiB (the smallest that works, with room for what leaves, is" in said
    assert "no plan can bring this step below" in said
    assert said.count(" host ") >= len(made.moves)
    assert "aten" not in said


def test_with_recompute_it_is_faster_and_says_so(tmp_path: Path) -> None:
    _, moves = run(tmp_path, "--budget", "2GiB", "--no-recompute")
    said, both = run(tmp_path, "--budget", "2GiB")
    assert both.predicted.step_s < moves.predicted.step_s
    assert "made again by 1 op" in said


def test_nothing_has_to_move(tmp_path: Path) -> None:
    said, made = run(tmp_path, "--budget", "64GiB")
    assert made.moves == ()
    assert "nothing has to move" in said


def test_too_small(tmp_path: Path) -> None:
    with pytest.raises(BudgetTooSmall, match="smallest budget"):
        run(tmp_path, "--budget", "100MiB")


def test_rules_hold(tmp_path: Path) -> None:
    _, free = run(tmp_path, "--budget", "2GiB", "--no-recompute")
    most = len(free.moves)
    _, few = run(tmp_path, "--budget", "2GiB", "--no-recompute", "--rule", f"most_values={most - 1}")
    assert len(few.moves) < most
    _, read = run(tmp_path, "--budget", "2GiB", "--no-recompute", "--rule", "copies=wait in")
    assert {blocks(8).values[move.value].idle[move.stretch].stop - move.reload_op for move in read.moves} == {
        0
    }
    said, _ = run(tmp_path, "--budget", "64GiB", "--rule", "keep_modules=nowhere")
    assert "the rule keep_modules 'nowhere' matches nothing" in said


def test_figures(tmp_path: Path) -> None:
    """Alone on standard output, with what each value is and why it leaves."""
    _, made = run(tmp_path, "--budget", "2GiB", "--no-recompute")
    files = [str(tmp_path / "tape.json"), "--machine", str(tmp_path / "machine.json")]
    done = CliRunner().invoke(
        app, ["plan", *files, "--budget", "2GiB", "--no-recompute", "--host-budget", "1TiB", "--json", "-"]
    )
    found = json.loads(done.stdout)
    assert found["predicted"]["step_s"] == made.predicted.step_s
    assert [move["value"] for move in found["moves"]] == [move.value for move in made.moves]
    assert all(move["reason"] and move["bytes"] for move in found["moves"])
    assert "predicted peak" in done.stderr
