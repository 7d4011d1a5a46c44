"""Command: ``torchlms bench`` without the command line: rivals first, then the run, then the files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchlms.bench.compare import compare_losses, rival_options, run_apart
from torchlms.bench.networks import get_network
from torchlms.bench.options import BenchOptions, Way
from torchlms.bench.result import failed_json, result_json, write_csv
from torchlms.bench.runner import run
from torchlms.bench.table import COLUMNS, comparison_rows
from torchlms.errors import BadOption, LMSError
from torchlms.outlet import Put, check_folder, into_nothing, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Write = Callable[[str], None]
    WriteTable = Callable[[Sequence[str], Sequence[Sequence[str]]], None]


@dataclass(frozen=True, slots=True)
class BenchCommand:
    """One call of the command: a run, its rivals, and where results go."""

    options: BenchOptions
    compare: tuple[Way, ...] = ()
    cap_rivals: bool = False
    compare_timeout_s: float = 600.0
    identity: bool = False
    report: bool = False
    csv_path: Path | None = None


class NotIdentical(LMSError):
    """``--identity`` was asked for and the losses are not the plain run's."""


def bench(
    command: BenchCommand, write: Write, write_table: WriteTable, put: Put = into_nothing
) -> dict[str, Any]:
    """Run it all. ``put`` gets the result also when the run fails, with ``error`` in it.

    Rivals go first, while this process holds nothing on the device.
    """
    ways = command.compare
    if command.identity and Way.NONE not in ways and command.options.way is not Way.NONE:
        ways = (Way.NONE, *ways)
    check_folder(command.csv_path)
    options = command.options.resolve(get_network(command.options.model))
    if options.budget is None and (command.cap_rivals or Way.NONE_CAPPED in ways):
        raise BadOption("rivals under a cap need --budget: the budget is their cap")
    rivals = [_run_rival(command, options, way, write) for way in ways]
    try:
        measurement = run(options, write, watch_steps=command.csv_path is not None)
    except Exception as error:
        put({**failed_json(options, str(error) or type(error).__name__), "compare": rivals})
        raise
    result = {**result_json(measurement), "compare": rivals}
    if command.report and measurement.report:
        write(measurement.report)
    if rivals:
        write_table(COLUMNS, comparison_rows([result, *rivals]))
    identity = next((compare_losses(result["losses"], r["losses"]) for r in _plain(rivals)), None)
    if identity is not None:
        write(str(identity))
        result["identity"] = {
            "with": Way.NONE.value,
            "steps": identity.steps,
            "first_difference": identity.first_difference,
        }
    put(result)
    if command.csv_path is not None:
        with writing(command.csv_path):
            write_csv(measurement, command.csv_path)
    if command.identity and (identity is None or identity.first_difference is not None):
        raise NotIdentical(str(identity) if identity else "losses: the plain run gave none to compare with")
    return result


def pace(options: BenchOptions) -> tuple[int, str]:
    """Items in a step, and what they are."""
    network = get_network(options.model)
    return network.items_per_step(options.resolve(network).network_options()), network.unit


def _run_rival(command: BenchCommand, options: BenchOptions, way: Way, write: Write) -> dict[str, Any]:
    write(f"Comparing with {way.value}, in a process of its own")
    result = run_apart(
        rival_options(options, way, cap=command.cap_rivals), timeout_s=command.compare_timeout_s
    )
    if "error" in result:
        write(f"{way.value}: {result['error']}")
    else:
        write(f"{way.value}: total {result['unit']}/sec: {result['items_per_s']:.2f}")
    return result


def _plain(rivals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rival for rival in rivals if rival["way"] == Way.NONE.value and "losses" in rival]
