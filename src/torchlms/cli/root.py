"""Root: the command itself, and what the options before the verb said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.runner.request import Request

_HELP = ["-h", "--help"]

app = typer.Typer(
    name="torchlms",
    help="Train networks that need more memory than the device has, on stock PyTorch.",
    epilog="To begin with: torchlms demo (two minutes), then torchlms run --budget 80% train.py",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": _HELP},
)


@dataclass
class _Session:
    """What was asked for, as far as it outlives the parser."""

    debug: bool = False
    script: Request | None = None


_session = _Session()


def debugging() -> bool:
    """Whether errors are shown with their traceback."""
    return _session.debug


def hand_over(script: Request) -> None:
    """Leave ``script`` to be run once typer has let go."""
    _session.script = script


def script_to_run() -> Request | None:
    """What ``torchlms run`` was asked for, handed over once."""
    script, _session.script = _session.script, None
    return script


def add(verb: Callable[..., None], example: str, *, arguments_end_options: bool = False) -> None:
    """Make a verb of a function. The first line of its docstring is its help, unabridged in the list, too."""
    app.command(
        short_help=(verb.__doc__ or "").strip(),
        epilog=f"Example: torchlms {example}",
        context_settings={"allow_interspersed_args": not arguments_end_options, "help_option_names": _HELP},
    )(verb)


def _version_asked(asked: bool) -> None:
    if asked:
        from torchlms.cli.machine import version

        version()
        raise typer.Exit


# typer reads annotations while it runs, so this must exist then.
Context = typer.Context


@app.callback()
def options_for_all(
    context: Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one line.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_version_asked, is_eager=True, help="Versions, then stop.")
    ] = False,
) -> None:
    """Train networks that need more memory than the device has, on stock PyTorch."""
    _session.debug = debug
    if context.invoked_subcommand is None:  # no verb: that is a question, not a mistake
        typer.echo(context.get_help())
