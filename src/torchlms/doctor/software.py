"""Software: versions, the settings of torch's allocator, and the table of ops that may run again."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch

import torchlms
from torchlms.doctor.finding import Finding, attention, fine, note
from torchlms.eager.replayable import TABLE, may_replay

_LIKELY = "expandable_segments:True"


def versions() -> Iterator[Finding]:
    """Python, the system, and torch against the range this package was made for."""
    python = ".".join(str(part) for part in sys.version_info[:3])
    system = f"Python {python}, {platform.system()} {platform.release()}"
    if platform.system() == "Linux":
        yield fine("system", system)
    else:
        yield attention("system", system, "use Linux: memory limits and spill files are read its way")
    yield fine("torchlms", torchlms.__version__)
    yield torch_in_range(torch.__version__, _required_torch())


def torch_in_range(version: str, required: str) -> Finding:
    """``required`` as in the package's own requirements, such as ``torch<2.16,>=2.11``; "" if not known."""
    lowest, beyond = (re.search(rf"{sign}\s*([\d.]+)", required) for sign in (">=", "<"))
    if lowest is None or beyond is None:
        return note("torch", f"{version}; this torchlms is not installed, so that its range is not known")
    spoken = f"{lowest[1]} up to, not including, {beyond[1]}"
    if _numbers(lowest[1]) <= _numbers(version) < _numbers(beyond[1]):
        return fine("torch", f"{version}, within {spoken}")
    next_step = f"pip install 'torch>={lowest[1]},<{beyond[1]}'"
    return attention("torch", f"{version} is outside of what was tested: {spoken}", next_step)


def _required_torch() -> str:
    try:
        wanted = metadata.requires("torchlms") or []
    except metadata.PackageNotFoundError:
        return ""
    return next((line for line in wanted if re.match(r"torch\b(?!\w)", line)), "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:2])


def allocator(environment: Mapping[str, str], *, cuda: bool) -> Finding:
    """What the environment asks of the caching allocator, against what LMS needs of it."""
    topic = "allocator"
    if not cuda:
        return fine(topic, "its settings do not matter without a CUDA device")
    if environment.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "0") not in ("", "0"):
        return attention(
            topic,
            "PYTORCH_NO_CUDA_MEMORY_CACHING is set: nothing holds the budget",
            "unset PYTORCH_NO_CUDA_MEMORY_CACHING",
        )
    name = next((n for n in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if environment.get(n)), "")
    settings = environment.get(name, "").replace(" ", "")
    if "backend:cudaMallocAsync" in settings:
        return attention(
            topic,
            f"{name}={settings}: holes between tensors cannot be closed there, nor seen",
            f"unset {name}, or take backend:cudaMallocAsync out of it",
        )
    if "expandable_segments:True" in settings:
        return fine(topic, f"{name}={settings}")
    said = f"{name}={settings}" if name else "no settings in the environment"
    return note(
        topic,
        f"{said}; LMS turns expandable segments on while it is on, not for what was allocated before",
        f"export PYTORCH_CUDA_ALLOC_CONF={','.join(_without_segments(settings) + [_LIKELY])}",
    )


def _without_segments(settings: str) -> list[str]:
    """The settings but that for expandable segments; commas stand within brackets, too."""
    items = re.split(r",(?![^\[]*\])", settings)
    return [item for item in items if item and not item.startswith("expandable_segments")]


def replay_table(device_type: str, table: Path = TABLE) -> Finding:
    """Whether values may be dropped and made again on this kind of device."""
    topic = "recomputing"
    swept = json.loads(table.read_text()).get(device_type)
    if swept is None:
        return note(
            topic,
            f"no op has been shown to give the same bits again on {device_type}: values only move",
            f"python -m torchlms.sweep.command --device {device_type}, once",
        )
    good = sum(may_replay(op, device_type) for op in swept["ops"])
    where = f"{swept['device']}, torch {swept['torch']}, {swept['date']}"
    return fine(topic, f"{good} of {len(swept['ops'])} ops swept may run again ({where})")
