"""The record: written by what ran, read again, and refused where it is another file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchlms
from tests.report_page.runs import NAMES, run
from torchlms.report_page import save_run
from torchlms.report_page.run import SCHEMA, Run
from torchlms.runner.request import Request
from torchlms.runner.watch import Watch
from torchlms.steps import ProfileWindow

typer_testing = pytest.importorskip("typer.testing")

from torchlms import cli  # noqa: E402
from torchlms.__main__ import main  # noqa: E402


def invoke(*arguments: str) -> Any:
    return typer_testing.CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_as_it_went(name: str, tmp_path: Path) -> None:
    run(name).save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run(name)


def test_of_a_loop(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
    with torchlms.LMS(model, budget="7MiB") as lms:
        with pytest.raises(torchlms.NotSupported, match="first step has to be recorded"):
            save_run(lms, tmp_path / "run.json")
        for _ in range(5):
            model(torch.randn(1024, 256)).relu().sum().backward()
            model.zero_grad()
        save_run(lms, tmp_path / "on.json")
    # As `torchlms run` does at the end of a script.
    ending = {"state": "guard", "ended_by": None}
    Watch(Request("train.py", save_run=tmp_path / "run.json"))._hand_over(lms, ending)
    found = Run.load(tmp_path / "run.json")
    assert found.plan is not None
    assert found.plan.fingerprint == found.tape.fingerprint
    assert found.tape.model == "Sequential"
    assert found.stats["state"] == Run.load(tmp_path / "on.json").stats["state"] == "guard"
    assert found.steps_s
    assert found.versions["torchlms"] == torchlms.__version__


def test_bench_saves_and_report_draws(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    path = tmp_path / "run.json"
    small = ("--model=mnist", "--batch-size=8", "--num-batches=1", "--warmup=4", "--device=cpu")
    done = invoke("bench", *small, f"--save-run={path}")
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())["schema"] == SCHEMA
    done = invoke("report", str(path), f"--trace={tmp_path / 'trace.json'}", "-o", str(tmp_path / "r.html"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_page_lies_beside_the_run(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    run("host").save(tmp_path / "run.json")
    assert invoke("report", str(tmp_path / "run.json"), "--no-curve").exit_code == 0
    assert (tmp_path / "run.html").exists()


def test_a_trace_alone(tmp_path: Path) -> None:
    run("host").save(tmp_path / "run.json")
    assert invoke("report", str(tmp_path / "run.json"), f"--trace={tmp_path / 't.json'}").exit_code == 0
    assert not (tmp_path / "run.html").exists()


def test_a_profile_is_drawn_into_the_trace(tmp_path: Path) -> None:
    path, profile, trace = (tmp_path / name for name in ("run.json", "profile.json", "trace.json"))
    run("host").save(path)
    with ProfileWindow(profile, first=0, last=0) as window:
        torch.ones(3).exp()
        window.step()
    done = invoke("report", str(path), f"--trace={trace}", f"--profile={profile}")
    assert done.exit_code == 0, done.output
    assert "aten::exp" in {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}


def test_help_has_an_example() -> None:
    assert "Example: torchlms report" in " ".join(invoke("report", "--help").output.split())


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["report", "{}/none.json"], "cannot read run file"),
        (["report", "{}/tape.json"], "it holds a torchlms.tape/1, and not a torchlms.run/1"),
        (["report", "{}/run.json", "-o", "{}/no/where.html"], "its folder does not exist"),
        (["report", "{}/run.json", "-o", "{}/run.json"], "choose another name for what is to be written"),
        (["report", "{}/run.json", "--trace={}/t.json", "--profile={}/run.json"], "marks no step"),
        (["report", "{}/run.json", "--trace={}/t.json", "--profile={}/t.json"], "choose another name"),
        (["bench", "--model=mnist", "--no-lms", "--save-run={}/r.json"], "runs without it"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("host").save(tmp_path / "run.json")
    run("host").tape.save(tmp_path / "tape.json")
    assert main([argument.replace("{}", str(tmp_path)) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert wrong in said
    assert said.count("\n") == 1
