"""Command: ``torchlms doctor`` without the command line: look at everything, and say it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from torchlms.doctor import device, host, software
from torchlms.doctor.finding import Finding, State
from torchlms.memory import probe
from torchlms.memory.spill_place import directory_for

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = "torchlms.doctor/1"

Write = Callable[[str, State | None], None]


def doctor(disk_dir: Path | None, write: Write) -> dict[str, Any]:
    """All findings as JSON, ``fine`` if nothing needs attention; each goes to ``write`` with its state."""
    findings = list(examine(disk_dir))
    for finding in findings:
        write(f"{finding.state.value:9}  {finding.topic:13}  {finding.found}", finding.state)
        if finding.next_step:
            write(f"{'':26}next: {finding.next_step}", None)
    write(summary(findings), None)
    return as_json(findings)


def examine(disk_dir: Path | None) -> Iterator[Finding]:
    """All findings, each looked up when it is asked for."""
    cuda = torch.cuda.is_available()
    chosen = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    folder = directory_for(disk_dir)
    measured = probe.cached(chosen, folder)
    yield from software.versions()
    if cuda:
        yield from device.cuda_device(chosen, measured)
    else:
        yield device.no_device(os.environ)
    device_bytes = int(torch.cuda.get_device_properties(chosen).total_memory) if cuda else 0
    yield from host.host_findings(folder, device_bytes=device_bytes, measured=measured)
    yield software.allocator(os.environ, cuda=cuda)
    yield software.replay_table(chosen.type)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "torchlms": _version(),
        "fine": not any(finding.state is State.ATTENTION for finding in findings),
        "findings": [dataclasses.asdict(item) | {"state": item.state.value} for item in findings],
    }


def summary(findings: list[Finding]) -> str:
    wrong = sum(finding.state is State.ATTENTION for finding in findings)
    if not wrong:
        return "nothing needs attention"
    return f"{wrong} {'thing needs' if wrong == 1 else 'things need'} attention"


def _version() -> str:
    try:
        return metadata.version("torchlms")
    except metadata.PackageNotFoundError:
        return "not installed"
