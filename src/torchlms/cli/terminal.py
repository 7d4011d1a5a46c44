"""Terminal: lines and tables, plain where nobody looks at them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.doctor.finding import State


def write(line: str) -> None:
    print(line, flush=True)  # a pipe should see each step as it ends


def write_finding(line: str, state: State | None) -> None:
    colour = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "attention": typer.colors.RED}
    word, gap, rest = line.partition("  ") if state is not None else ("", "", line)
    typer.echo(typer.style(word, fg=colour[state.value]) + gap + rest if state is not None else rest)


def write_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from torchlms.bench.table import plain_table

    if not sys.stdout.isatty():
        for line in plain_table(columns, rows):
            write(line)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
