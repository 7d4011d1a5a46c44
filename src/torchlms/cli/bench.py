"""Bench: the verbs that measure training on synthetic data."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchlms.cli import completion
from torchlms.cli import options as opt
from torchlms.cli.root import debugging
from torchlms.cli.terminal import write, write_table

if TYPE_CHECKING:
    from pathlib import Path

    from torchlms.bench.options import BenchOptions
    from torchlms.report_page.saving import Onlooker

# typer reads annotations while it runs, so these must exist then.
Text = opt.Text
File = opt.File


def bench(
    model: opt.Model = "resnet50",
    batch_size: Annotated[int, typer.Option(help="Samples per step. 0: the network's own.")] = 0,
    image_size: opt.ImageSize = 0,
    num_batches: Annotated[int, typer.Option(help="Timed steps.")] = 100,
    warmup: Annotated[
        int, typer.Option(help="Steps before timing. -1: 20 with LMS (CPU: 5), 3 without.")
    ] = -1,
    display_every: Annotated[int, typer.Option(help="Steps between two lines of output.")] = 10,
    device: opt.Device = "",
    dtype: opt.Dtype = "float32",
    optimizer: opt.Optimizer = "",
    learning_rate: Annotated[float, typer.Option(help="0: 0.01 for sgd, 0.0003 for the others.")] = 0.0,
    budget: opt.Budget = None,
    host_budget: opt.HostBudget = None,
    disk_dir: opt.SpillDir = None,
    disk_budget: opt.SpillBudget = None,
    plan: opt.PlanFile = None,
    recompute: opt.Recompute = True,
    rule: opt.Rule = None,
    verify: opt.Verify = False,
    verify_every: opt.VerifyEvery = 0,
    snapshot: opt.Snapshot = False,
    no_lms: Annotated[bool, typer.Option("--no-lms", help="The plain run, nothing installed.")] = False,
    way: Annotated[
        Text,
        typer.Option(
            help="lms, none, none_capped, save_on_cpu, checkpoint or checkpoint_offload.",
            autocompletion=completion.ways,
        ),
    ] = None,
    cap: Annotated[Text, typer.Option(help="Without LMS, on CUDA: cap the allocator: bytes or none.")] = None,
    compare: Annotated[
        str,
        typer.Option(
            help="Other ways to run first, separated by commas.", autocompletion=completion.several_ways
        ),
    ] = "",
    compare_timeout: Annotated[float, typer.Option(help="Seconds for each other way.")] = 600.0,
    cap_rivals: Annotated[
        bool, typer.Option("--cap-rivals", help="Cap the other ways at --budget too.")
    ] = False,
    identity: Annotated[
        bool, typer.Option("--identity", help="Fail unless losses equal the plain run's, bit for bit.")
    ] = False,
    seed: Annotated[int, typer.Option(help="For weights, data and dropout.")] = 1,
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
    report: opt.Report = False,
    json_path: opt.Json = None,
    csv_path: opt.Csv = None,
    save_run: opt.SaveRun = None,
    log: opt.Log = "",
    live: Annotated[bool, typer.Option(help="On a terminal, a line that says what LMS is doing.")] = True,
    list_models: Annotated[bool, typer.Option("--list", help="List the networks and stop.")] = False,
    stale: Annotated[File, typer.Option(help="List results in this folder made by other code; stop.")] = None,
) -> None:
    """Time training on synthetic data: speed, peak memory, losses; with LMS, without it, and rivals."""
    asked = dict(locals())  # names of parameters are names of options
    if stale is not None:
        raise typer.Exit(_list_stale(stale))
    if list_models:
        _list_networks(json_path)
        return
    from torchlms.api import stats
    from torchlms.bench import command as bench_command
    from torchlms.bench.options import BenchOptions, parse_ways
    from torchlms.errors import BudgetTooSmall
    from torchlms.live import live_line
    from torchlms.loudness import choose
    from torchlms.outlet import check_folder, outlet

    choose(log)
    check_folder(json_path, csv_path, save_run)
    asked["rule"] = tuple(rule or ())
    names = {field.name for field in dataclasses.fields(BenchOptions)} - {"way"}
    options = BenchOptions(way=_way(way, no_lms), **{name: asked[name] for name in names})
    onlooker = _onlooker(save_run, options)
    command = bench_command.BenchCommand(
        options=options,
        compare=parse_ways(compare),
        cap_rivals=cap_rivals,
        compare_timeout_s=compare_timeout,
        identity=identity,
        report=report,
        csv_path=csv_path,
    )
    try:
        items, unit = bench_command.pace(options)
        line = live_line(stats, items=items, unit=unit) if live else contextlib.nullcontext()
        with outlet(json_path) as put, line:
            bench_command.bench(command, onlooker or write, write_table, put)
    except bench_command.NotIdentical as error:
        if debugging():
            raise
        typer.echo(f"torchlms: {error}", err=True)
        raise typer.Exit(1) from None
    except BudgetTooSmall as error:
        raise BudgetTooSmall(
            f"{error}. Or ask beforehand: {_fit_command(options)}, with the same options for the network, "
            "says what it takes",
            smallest_bytes=error.smallest_bytes,
        ) from error
    if onlooker is not None and save_run is not None:
        onlooker.save(save_run)


def demo(json_path: opt.Json = None) -> None:
    """Train ResNet-50 plain and under 60% of the memory it needs; under two minutes on two cores."""
    from torchlms.bench.demo import demo as run_demo
    from torchlms.outlet import outlet

    with outlet(json_path) as put:
        run_demo(write, write_table, put=put)


def _fit_command(options: BenchOptions) -> str:
    """What answers without a tape at hand, which bench does not keep."""
    batch = f" --batch-size {options.batch_size}" if options.batch_size else ""
    device = f" --device {options.device}" if options.device else ""
    budget = f" --budget {options.budget}" if options.budget else ""
    return f"`torchlms fit --model {options.model}{batch}{device}{budget}`"


def _way(way: str | None, no_lms: bool) -> Any:
    from torchlms.bench.options import Way
    from torchlms.errors import BadOption

    if no_lms and way not in (None, "none"):
        raise BadOption(f"--no-lms contradicts --way {way}")
    try:
        return Way.NONE if no_lms else Way(way or "lms")
    except ValueError:
        raise BadOption(f"--way {way}: choose from {', '.join(known.value for known in Way)}") from None


def _onlooker(save_run: Path | None, options: BenchOptions) -> Onlooker | None:
    """What sees the run that is to be kept; None if none is."""
    from torchlms.bench.options import Way
    from torchlms.errors import BadOption
    from torchlms.report_page.saving import Onlooker

    if save_run is None:
        return None
    if options.way is not Way.LMS:
        raise BadOption(f"--save-run keeps what LMS did, and --way {options.way.value} runs without it")
    return Onlooker(write)


def _list_stale(folder: Path) -> int:
    from torchlms.bench.provenance import stale_results

    stale = stale_results(folder)
    for path in stale:
        write(str(path))
    return 1 if stale else 0


def _list_networks(json_path: Path | None) -> None:
    from torchlms.bench.networks import NETWORKS
    from torchlms.outlet import outlet

    columns = ("name", "batch", "size", "what")
    rows = [
        [net.name, str(net.default_batch_size), str(net.default_image_size or "-"), net.description]
        for net in NETWORKS.values()
    ]
    with outlet(json_path) as put:
        put([dict(zip(columns, row, strict=True)) for row in rows])
        write_table(columns, rows)
