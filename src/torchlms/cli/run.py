"""Run: the verb that runs an unmodified script."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from torchlms.cli import options as opt
from torchlms.cli.root import debugging, hand_over

# typer reads annotations while it runs, so these must exist then.
Text = opt.Text
File = opt.File
Words = opt.Words


def run(
    script: Annotated[
        Words, typer.Argument(help="A script, a module after -m or code after -c, and its arguments.")
    ],
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
    code: Annotated[bool, typer.Option("-c", help="Run code, as python -c does.")] = False,
    budget: opt.Budget = None,
    host_budget: opt.HostBudget = None,
    disk_dir: opt.SpillDir = None,
    disk_budget: opt.SpillBudget = None,
    plan: opt.PlanFile = None,
    no_plan: opt.NoPlan = False,
    recompute: opt.Recompute = True,
    rule: opt.Rule = None,
    verify: opt.Verify = False,
    verify_every: opt.VerifyEvery = 0,
    snapshot: opt.Snapshot = False,
    device: Annotated[Text, typer.Option(help="cuda, cuda:1 or cpu. Default: the model's own.")] = None,
    save_plan: Annotated[File, typer.Option(help="Write the plan to this file at the end.")] = None,
    save_tape: Annotated[File, typer.Option(help="Write the recorded step to this file at the end.")] = None,
    json_path: opt.Json = None,
    save_run: opt.SaveRun = None,
    csv_path: opt.Csv = None,
    skip: Annotated[int, typer.Option(help="First steps left out of the averages that --csv gives.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Items in a step, for items per second.")] = 0,
    profile: Annotated[File, typer.Option(help="Write a trace of some steps, by torch's profiler.")] = None,
    profile_steps: Annotated[str, typer.Option(help="Which ones, counted from 0.")] = "10-12",
    live: Annotated[bool, typer.Option("--live", help="On a terminal, a line of what LMS is doing.")] = False,
    report: opt.Report = False,
    log: opt.Log = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")] = False,
) -> None:
    """Run an unmodified training script within a budget; all that follows its name is the script's own."""
    asked = dict(locals())  # names of parameters are names of options
    from torchlms.runner.request import Request

    asked["rule"] = tuple(rule or ())
    names = {field.name for field in dataclasses.fields(Request)} & asked.keys()
    # Carried out by torchlms.__main__: here typer stands around us and catches what the script raises.
    hand_over(
        Request(
            target=script[0],
            arguments=tuple(script[1:]),
            as_module=module,
            as_code=code,
            whole_tracebacks=debugging(),
            **{name: asked[name] for name in names},
        )
    )
