"""Machine: verbs that look at what is here: its state, its rates, its versions."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

import typer

from torchlms.cli import options as opt
from torchlms.cli.terminal import write, write_finding, write_table

# typer reads annotations while it runs, so these must exist then.
Text = opt.Text
File = opt.File


def doctor(
    disk_dir: Annotated[File, typer.Option(help="Folder for spill files. Default: a cache.")] = None,
    json_path: opt.Json = None,
) -> None:
    """Is this machine in order? Versions, device, link, memory, disk; exit status 1 if something is not."""
    from torchlms.doctor import command as doctor_command
    from torchlms.outlet import outlet

    with outlet(json_path) as put:
        found = doctor_command.doctor(disk_dir, write_finding)
        put(found)
    if not found["fine"]:
        raise typer.Exit(1)


def probe(
    device: opt.Device = "",
    disk_dir: Annotated[Text, typer.Option(help="Folder whose disk is measured. Default: a cache.")] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again instead of reading the cache.")
    ] = False,
    json_path: opt.Json = None,
) -> None:
    """Measure what this machine can do: links, host memory, disk. Cached per machine."""
    from torchlms import api
    from torchlms.core.record import to_json
    from torchlms.memory.device import read_device, supported
    from torchlms.outlet import outlet
    from torchlms.report_page.machine_rows import machine_rows

    with outlet(json_path) as put:
        chosen = supported(read_device(device))
        machine = api.measured_machine(chosen, disk_dir, refresh=refresh, progress=write)
        put(to_json(machine))
        write_table(("what", "figure"), machine_rows(machine))


def version(json_path: opt.Json = None) -> None:
    """Print the versions of torchlms, Python and torch."""
    import torch

    from torchlms.outlet import outlet

    found = {
        "torchlms": metadata.version("torchlms"),
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "torch": str(torch.__version__),
    }
    with outlet(json_path) as put:
        write(f"torchlms {found['torchlms']}, Python {found['python']}, torch {found['torch']}")
        put(found)
