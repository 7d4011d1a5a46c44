"""Report: the verb that draws a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchlms.cli import options as opt
from torchlms.cli.terminal import write

# typer reads annotations while it runs, so this must exist then.
File = opt.File


def report(
    run: Annotated[Path, typer.Argument(help="The record of a run: --save-run of bench or run.")],
    page: Annotated[
        File, typer.Option("--output", "-o", help="The page. Default: run.html for run.json.")
    ] = None,
    trace: Annotated[File, typer.Option(help="Also, or without -o only: a trace for Perfetto.")] = None,
    profile: Annotated[
        File, typer.Option(help="Also shown: a step that run --profile or ProfileWindow saw.")
    ] = None,
    curve: Annotated[bool, typer.Option(help="Draw speed against budget: some planning.")] = True,
    json_path: opt.Json = None,
) -> None:
    """Draw a run as one HTML page: memory, queues, speed against budget, every value with its reason."""
    from torchlms.outlet import outlet
    from torchlms.report_page.command import ReportOrder
    from torchlms.report_page.command import report as make_report

    with outlet(json_path) as put:
        put(make_report(ReportOrder(run, page, trace, profile, curve, json_path is not None), write))
