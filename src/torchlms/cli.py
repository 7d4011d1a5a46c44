"""cli: the verbs of the ``torchlms`` command; each one reads options and calls one function."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchlms import cli_options as opt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.bench.options import BenchOptions
    from torchlms.doctor.finding import State
    from torchlms.report_page.saving import Onlooker
    from torchlms.runner.request import Request

app = typer.Typer(
    name="torchlms",
    help="Train networks that need more memory than the device has, on stock PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# typer reads annotations while it runs, so these must exist then.
Text = opt.Text
File = opt.File
Words = opt.Words


@dataclasses.dataclass
class _Session:
    """What the options before the verb said."""

    debug: bool = False
    script: Request | None = None


_session = _Session()


def debugging() -> bool:
    """Whether errors are shown with their traceback."""
    return _session.debug


def script_to_run() -> Request | None:
    """What ``torchlms run`` was asked for, handed over once."""
    script, _session.script = _session.script, None
    return script


def _version_asked(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def options_for_all(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one line.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_version_asked, is_eager=True, help="As the verb.")
    ] = False,
) -> None:
    """Train networks that need more memory than the device has, on stock PyTorch."""
    _session.debug = debug


@app.command(epilog="Example: torchlms bench --model resnet50 --batch-size 200 --budget 16GiB")
def bench(
    model: Annotated[str, typer.Option(help="A name from --list, or package.module:factory.")] = "resnet50",
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
    disk_dir: Annotated[Text, typer.Option(help="Folder for a spill file. Default: a cache.")] = None,
    disk_budget: Annotated[Text, typer.Option(help="Size of the spill file: bytes or 500GB.")] = None,
    plan: Annotated[Text, typer.Option(help="A plan file to use instead of planning.")] = None,
    recompute: opt.Recompute = True,
    rule: opt.Rule = None,
    no_lms: Annotated[bool, typer.Option("--no-lms", help="The plain run, nothing installed.")] = False,
    way: Annotated[
        Text,
        typer.Option(help="lms, none, none_capped, save_on_cpu, checkpoint or checkpoint_offload."),
    ] = None,
    cap: Annotated[Text, typer.Option(help="Without LMS, on CUDA: cap the allocator: bytes or none.")] = None,
    compare: Annotated[str, typer.Option(help="Other ways to run first, separated by commas.")] = "",
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
    report: Annotated[bool, typer.Option("--report", help="Print LMS's own report at the end.")] = False,
    json_path: Annotated[File, typer.Option("--json", help="Write the result to this file.")] = None,
    csv_path: Annotated[File, typer.Option("--csv", help="Write one row per step to this file.")] = None,
    save_run: opt.SaveRun = None,
    live: Annotated[bool, typer.Option(help="On a terminal, a line that says what LMS is doing.")] = True,
    list_models: Annotated[bool, typer.Option("--list", help="List the networks and stop.")] = False,
    stale: Annotated[File, typer.Option(help="List results in this folder made by other code; stop.")] = None,
) -> None:
    """Time training on synthetic data: speed, peak memory, losses; with LMS, without it, and rivals."""
    asked = dict(locals())  # names of parameters are names of options
    if stale is not None:
        raise typer.Exit(_list_stale(stale))
    if list_models:
        _list_networks()
        return
    from torchlms.api import stats
    from torchlms.bench import command as bench_command
    from torchlms.bench.options import BenchOptions, parse_ways
    from torchlms.live import live_line

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
        json_path=json_path,
        csv_path=csv_path,
    )
    try:
        with live_line(stats) if live else contextlib.nullcontext():
            bench_command.bench(command, onlooker or _write, _write_table)
    except bench_command.NotIdentical as error:
        if debugging():
            raise
        typer.echo(f"torchlms: {error}", err=True)
        raise typer.Exit(1) from None
    if onlooker is not None and save_run is not None:
        onlooker.save(save_run)


@app.command(epilog="Example: torchlms demo")
def demo() -> None:
    """Train ResNet-50 plain and under 60% of the memory it needs; under two minutes on two cores."""
    from torchlms.bench.demo import demo as run_demo

    run_demo(_write, _write_table)


@app.command(epilog="Example: torchlms probe --disk-dir /scratch --refresh")
def probe(
    device: opt.Device = "",
    disk_dir: Annotated[Text, typer.Option(help="Folder whose disk is measured. Default: a cache.")] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again instead of reading the cache.")
    ] = False,
    json_path: Annotated[File, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure what this machine can do: links, host memory, disk. Cached per machine."""
    from torchlms import api
    from torchlms.memory.device import read_device, supported
    from torchlms.report_page.machine_rows import machine_rows

    machine = api.measured_machine(supported(read_device(device)), disk_dir, refresh=refresh, progress=_write)
    if json_path is not None:
        machine.save(json_path)
    _write_table(("what", "figure"), machine_rows(machine))


@app.command(
    epilog="Example: torchlms fit --model resnet50 --batch-size 200 --budget 16GiB --curve --largest"
)
def fit(
    model: Annotated[str, typer.Option(help="As for bench: a name, or package.module:factory.")] = "resnet50",
    batch_size: Annotated[int, typer.Option(help="The batch asked about. 0: the network's own.")] = 0,
    image_size: opt.ImageSize = 0,
    device: opt.Device = "",
    dtype: opt.Dtype = "float32",
    optimizer: opt.Optimizer = "",
    budget: opt.Budget = None,
    host_budget: opt.HostBudget = None,
    disk_dir: Annotated[Text, typer.Option(help="Folder whose disk is meant. Default: a cache.")] = None,
    disk_budget: Annotated[Text, typer.Option(help="Disk for what leaves: bytes or 500GB.")] = None,
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
    machine: Annotated[File, typer.Option(help="Rates of another machine: torchlms probe --json.")] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Step time against budget.")] = False,
    largest: Annotated[bool, typer.Option("--largest", help="The largest batch that fits.")] = False,
    json_path: Annotated[
        File, typer.Option("--json", help="Write the answer to this file; - prints it.")
    ] = None,
) -> None:
    """Before training: does it fit in a budget, at what speed, and up to which batch."""
    asked = dict(locals())  # names of parameters are names of options
    from torchlms.bench.options import BenchOptions
    from torchlms.fit import command as fit_command
    from torchlms.fit.question import Question

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
        json_path=json_path,
    )
    fit_command.fit(question, _write, _write_table)


@app.command(epilog="Example: torchlms plan tape.json --budget 16GiB --save plan.json")
def plan(
    tape: Annotated[Path, typer.Argument(help="A recording: lms.tape.save(), or fit --save-tape.")],
    budget: opt.Budget = None,
    host_budget: opt.HostBudget = None,
    disk_dir: Annotated[Text, typer.Option(help="Folder whose disk is meant. Default: a cache.")] = None,
    disk_budget: Annotated[Text, typer.Option(help="Disk for what leaves: bytes or 500GB.")] = None,
    machine: Annotated[File, typer.Option(help="Rates of another machine: torchlms probe --json.")] = None,
    recompute: opt.Recompute = True,
    save: Annotated[File, typer.Option(help="Write the plan to this file.")] = None,
) -> None:
    """Plan a recorded step for a budget, and say the reason for each choice. No device is needed."""
    from torchlms.bench.options import BenchOptions
    from torchlms.fit.explain import PlanOrder, make_plan
    from torchlms.fit.question import Question

    options = BenchOptions(budget=budget, host_budget=host_budget, disk_dir=disk_dir, disk_budget=disk_budget)
    make_plan(PlanOrder(Question(options=options, tapes=(tape,), machine=machine), recompute, save), _write)


@app.command(
    epilog="Example: torchlms run --budget 16GiB --report train.py --epochs 10",
    context_settings={"allow_interspersed_args": False},
)
def run(
    script: Annotated[Words, typer.Argument(help="A script, or a module after -m, and its arguments.")],
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
    budget: opt.Budget = None,
    host_budget: opt.HostBudget = None,
    disk_dir: Annotated[Text, typer.Option(help="Folder for a spill file. Default: a cache.")] = None,
    disk_budget: Annotated[Text, typer.Option(help="Size of the spill file: bytes or 500GB.")] = None,
    plan: Annotated[Text, typer.Option(help="A plan file to use instead of planning.")] = None,
    recompute: opt.Recompute = True,
    rule: opt.Rule = None,
    device: Annotated[Text, typer.Option(help="cuda, cuda:1 or cpu. Default: the model's own.")] = None,
    save_plan: Annotated[File, typer.Option(help="Write the plan to this file at the end.")] = None,
    save_tape: Annotated[File, typer.Option(help="Write the recorded step to this file at the end.")] = None,
    json_path: Annotated[File, typer.Option("--json", help="Write figures to this file at the end.")] = None,
    save_run: opt.SaveRun = None,
    report: Annotated[bool, typer.Option("--report", help="Print LMS's own report at the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")] = False,
) -> None:
    """Run an unmodified training script within a budget; all that follows its name is the script's own."""
    asked = dict(locals())  # names of parameters are names of options
    from torchlms.runner.request import Request

    asked["rule"] = tuple(rule or ())
    names = {field.name for field in dataclasses.fields(Request)} & asked.keys()
    # Carried out by torchlms.__main__: here typer stands around us and catches what the script raises.
    _session.script = Request(
        target=script[0],
        arguments=tuple(script[1:]),
        as_module=module,
        whole_tracebacks=debugging(),
        **{name: asked[name] for name in names},
    )


@app.command(epilog="Example: torchlms report run.json -o report.html --trace trace.json")
def report(
    run: Annotated[Path, typer.Argument(help="The record of a run: --save-run of bench or run.")],
    page: Annotated[
        File, typer.Option("--output", "-o", help="The page. Default: run.html for run.json.")
    ] = None,
    trace: Annotated[File, typer.Option(help="Also, or without -o only: a trace for Perfetto.")] = None,
    curve: Annotated[bool, typer.Option(help="Draw speed against budget: some planning.")] = True,
) -> None:
    """Draw a run as one HTML page: memory, queues, speed against budget, every value with its reason."""
    from torchlms.report_page.command import ReportOrder
    from torchlms.report_page.command import report as make_report

    make_report(ReportOrder(run, page, trace, curve), _write)


@app.command(epilog="Example: torchlms doctor --disk-dir /scratch")
def doctor(
    disk_dir: Annotated[File, typer.Option(help="Folder for spill files. Default: a cache.")] = None,
    json_path: Annotated[
        File, typer.Option("--json", help="Write the findings to this file; - prints them.")
    ] = None,
) -> None:
    """Is this machine in order? Versions, device, link, memory, disk; exit status 1 if something is not."""
    from torchlms.doctor import command as doctor_command

    if not doctor_command.doctor(disk_dir, json_path, _write_finding):
        raise typer.Exit(1)


@app.command(epilog="Example: torchlms version")
def version() -> None:
    """Print the versions of torchlms, Python and torch."""
    import torch

    python = ".".join(str(part) for part in sys.version_info[:3])
    _write(f"torchlms {metadata.version('torchlms')}, Python {python}, torch {torch.__version__}")


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
    if not save_run.absolute().parent.is_dir():
        raise BadOption(f"{save_run}: its folder does not exist")
    return Onlooker(_write)


def _list_stale(folder: Path) -> int:
    from torchlms.bench.provenance import stale_results

    stale = stale_results(folder)
    for path in stale:
        _write(str(path))
    return 1 if stale else 0


def _list_networks() -> None:
    from torchlms.bench.networks import NETWORKS

    rows = [
        [net.name, str(net.default_batch_size), str(net.default_image_size or "-"), net.description]
        for net in NETWORKS.values()
    ]
    _write_table(("name", "batch", "size", "what"), rows)


def _write(line: str) -> None:
    print(line, flush=True)  # a pipe should see each step as it ends


def _write_finding(line: str, state: State | None) -> None:
    colour = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "attention": typer.colors.RED}
    word, gap, rest = line.partition("  ") if state is not None else ("", "", line)
    typer.echo(typer.style(word, fg=colour[state.value]) + gap + rest if state is not None else rest)


def _write_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from torchlms.bench.table import plain_table

    if not sys.stdout.isatty():
        for line in plain_table(columns, rows):
            _write(line)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
