"""Fit: the verbs that answer before training: does it fit, and what would a plan do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from torchlms.cli import options as opt
from torchlms.cli.terminal import write, write_table

# typer reads annotations while it runs, so these must exist then.
Text = opt.Text
File = opt.File


def fit(
    model: opt.Model = "resnet50",
    batch_size: Annotated[int, typer.Option(help="The batch asked about. 0: the network's own.")] = 0,
    image_size: opt.ImageSize = 0,
    device: opt.Device = "",
    dtype: opt.Dtype = "float32",
    optimizer: opt.Optimizer = "",
    budget: opt.Budget = None,
    host_budget: opt.HostBudget = None,
    disk_dir: opt.DiskDir = None,
    disk_budget: opt.DiskBudget = None,
    recompute: opt.Recompute = True,
    rule: opt.Rule = None,
    cudnn_benchmark: opt.CudnnBenchmark = False,
    deterministic: opt.Deterministic = False,
    hidden: opt.Hidden = 2048,
    layers: opt.Layers = 24,
    heads: opt.Heads = 0,
    kv_heads: opt.KvHeads = 0,
    sequence: opt.Sequence = 4096,
    vocab: opt.Vocab = 32000,
    width: opt.Width = 16,
    norm: opt.Norm = "instance",
    record: Annotated[
        str, typer.Option(help="Batches to record, such as 50,100. Default: a quarter and a half.")
    ] = "",
    save_tape: Annotated[File, typer.Option(help="Keep the recordings: t.json makes t-50.json ...")] = None,
    tape: Annotated[
        opt.Files, typer.Option(help="A recording to read instead; twice for two batches.")
    ] = None,
    batch: Annotated[opt.Numbers, typer.Option(help="The batch of each --tape, in the same order.")] = None,
    machine: opt.MachineFile = None,
    curve: Annotated[bool, typer.Option("--curve", help="Step time against budget.")] = False,
    largest: Annotated[bool, typer.Option("--largest", help="The largest batch that fits.")] = False,
    log: opt.FitLog = "",
    json_path: opt.Json = None,
) -> None:
    """Before training: does it fit in a budget, at what speed, and up to which batch."""
    asked = dict(locals())  # names of parameters are names of options
    from torchlms.bench.options import BenchOptions
    from torchlms.fit import command as fit_command
    from torchlms.fit.question import Question
    from torchlms.loudness import softly
    from torchlms.outlet import outlet

    asked["rule"] = tuple(rule or ())
    names = {field.name for field in dataclasses.fields(BenchOptions)} & asked.keys()
    question = Question(
        options=BenchOptions(**{name: asked[name] for name in names}),
        record=record,
        tapes=tuple(tape or ()),
        batches=tuple(batch or ()),
        machine=machine,
        save_tape=save_tape,
        curve=curve,
        largest=largest,
    )
    # LMS speaks of the budget that it records under, which is not the one asked about.
    with softly(log), outlet(json_path) as put:
        put(fit_command.fit(question, write, write_table))


def plan(
    tape: Annotated[Path, typer.Argument(help="A recording: lms.tape.save(), or fit --save-tape.")],
    budget: opt.Budget = None,
    host_budget: opt.HostBudget = None,
    disk_dir: opt.DiskDir = None,
    disk_budget: opt.DiskBudget = None,
    machine: opt.MachineFile = None,
    recompute: opt.Recompute = True,
    rule: opt.Rule = None,
    save: Annotated[File, typer.Option(help="Write the plan to this file.")] = None,
    json_path: opt.Json = None,
) -> None:
    """Plan a recorded step for a budget, and say the reason for each choice. No device is needed."""
    asked = dict(locals())  # names of parameters are names of options
    from torchlms.bench.options import BenchOptions
    from torchlms.fit.explain import explain
    from torchlms.fit.question import Question
    from torchlms.outlet import outlet

    asked["rule"] = tuple(rule or ())
    names = {field.name for field in dataclasses.fields(BenchOptions)} & asked.keys() - {"plan"}
    options = BenchOptions(**{name: asked[name] for name in names})
    with outlet(json_path) as put:
        put(explain(Question(options=options, tapes=(tape,), machine=machine), write, save=save))
