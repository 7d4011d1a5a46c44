"""Facts: the machine that a result was measured on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from torchlms.bench.provenance import host_facts

_LAUNCHES = 500
_ROUNDS = 7


def device_facts(device: torch.device) -> dict[str, Any]:
    """Device, versions and host. Nothing in it names the machine or its user."""
    facts: dict[str, Any] = {
        "device": device.type,
        "device_name": cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": {**host_facts(), "cpu": cpu_name(), "threads": torch.get_num_threads()},
    }
    if device.type == "cuda":
        facts |= {
            "device_name": torch.cuda.get_device_name(device),
            "device_bytes": int(torch.cuda.get_device_properties(device).total_memory),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
        }
    return facts


def launch_s(device: torch.device) -> float:
    """How long this host takes to launch a small op, seconds: the median of several rounds. Hosts of one
    kind of card differ in it twofold, and so do steps that are bound by the program."""
    if device.type != "cuda":
        return 0.0
    with torch.no_grad():
        number = torch.zeros(1, device=device)
        rounds = [_launching_s(number, device) for _ in range(_ROUNDS)]
    return sorted(rounds)[_ROUNDS // 2]


def _launching_s(number: torch.Tensor, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    began_s = time.perf_counter()
    for _ in range(_LAUNCHES):
        number.add_(1)
    return (time.perf_counter() - began_s) / _LAUNCHES


def found_before(path: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The result in ``path`` if it is of the device, torch and code of ``head``; else empty."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    alike = all(result[name] == head[name] for name in ("device_name", "torch", "code"))
    return dict(result) if alike else {}


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def without_paths(text: str) -> str:
    """``text`` without paths of this machine: results are committed."""
    for path in (Path(__file__).resolve().parent.parent, Path(tempfile.gettempdir()), Path.home()):
        text = text.replace(str(path) + os.sep, "")
    return text


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where nothing tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines else None
