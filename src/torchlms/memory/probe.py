"""Measurements: what the links, the host memory and the disk of this machine can do, in seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import psutil  # type: ignore[import-untyped]
import torch

from torchlms.errors import LMSError
from torchlms.memory import rates
from torchlms.memory.limits import disk_free_bytes, host_available_bytes, memlock_limit_bytes
from torchlms.memory.spill_place import directory_for

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMA = "torchlms.probe/1"
CACHE_VARIABLE = "TORCHLMS_CACHE"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measurements:
    """Fields as in the Machine record, so that ``Machine(**fields)`` takes them once ``link`` is converted.

    ``link`` holds (size in bytes, seconds out, seconds in), sorted by size; empty on a CPU. Rates are
    bytes per second and 0 where not measured. What is free or available is a snapshot.
    """

    device: str
    device_bytes: int
    torch: str
    link: tuple[tuple[int, float, float], ...] = ()
    out_share: float = 1.0
    in_share: float = 1.0
    pageable_out_bytes_per_s: float = 0.0
    pageable_in_bytes_per_s: float = 0.0
    pin_bytes_per_s: float = 0.0
    touch_bytes_per_s: float = 0.0
    host_copy_bytes_per_s: float = 0.0
    disk_write_bytes_per_s: float = 0.0
    disk_read_bytes_per_s: float = 0.0
    disk_direct: bool = False
    host_available_bytes: int = 0
    memlock_bytes: int = -1
    disk_free_bytes: int = 0
    measured: str = ""


def load_or_measure(
    device: torch.device,
    disk_dir: Path | None,
    *,
    refresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Measurements:
    """What ``measure`` gives, from the cache when this machine, device, torch and disk were measured before.

    What is free or available is always of now. A cache that cannot be read is measured again and
    rewritten; one that cannot be written is done without.
    """
    disk_dir = directory_for(disk_dir)
    known = None if refresh else cached(device, disk_dir)
    if known is not None:
        return known
    measurements, whole = _measure(device, disk_dir, progress)
    if whole:  # what failed may work the next time
        _save(measurements, _cache_path(device, disk_dir))
    return measurements


def cached(device: torch.device, disk_dir: Path) -> Measurements | None:
    """What was measured before, with what is free now; None if nothing was, and nothing is measured then."""
    found = _load(_cache_path(device, disk_dir))
    if found is None:
        return None
    now: dict[str, Any] = _free_now(disk_dir)
    return dataclasses.replace(found, **now)


def cache_directory() -> Path:
    """``$TORCHLMS_CACHE`` where set, else the user's cache directory."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else platformdirs.user_cache_path("torchlms")


def measure(
    device: torch.device, disk_dir: Path | None, *, progress: Callable[[str], None] | None = None
) -> Measurements:
    """Measure everything, in some 5 seconds on an otherwise idle machine; ``progress`` is told each part.

    Takes up to 512 MiB of host memory, 512 MiB of the device and 256 MiB of disk, less where there is
    less, and gives them back. A part that cannot be measured is logged and left at its default.
    """
    return _measure(device, directory_for(disk_dir), progress)[0]


def _measure(
    device: torch.device, disk_dir: Path, progress: Callable[[str], None] | None
) -> tuple[Measurements, bool]:
    """``measure``, and whether every part could be measured."""
    tell = progress or (lambda part: None)
    whole = True
    found: dict[str, Any] = _free_now(disk_dir)
    parts: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if device.type == "cuda":
        parts.append(("link to the device", lambda: rates.measure_link(device)))
    parts.append(("host memory", rates.measure_host))
    parts.append(("disk", lambda: rates.measure_disk(disk_dir)))
    for part, run in parts:
        tell(part)
        try:
            found |= run()
        except (LMSError, OSError, RuntimeError) as error:
            whole = False
            _log.warning("could not measure the %s, and go on as if there were none: %s", part, error)
    measurements = Measurements(
        device=_device_name(device),
        device_bytes=_device_bytes(device),
        torch=torch.__version__,
        measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **found,
    )
    return measurements, whole


def _free_now(disk_dir: Path) -> dict[str, int]:
    return {
        "host_available_bytes": host_available_bytes(),
        "memlock_bytes": memlock_limit_bytes(),
        "disk_free_bytes": disk_free_bytes(disk_dir),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _cache_path(device: torch.device, disk_dir: Path) -> Path:
    return cache_directory() / f"machine-{_cache_key(device, disk_dir)}.json"


def _cache_key(device: torch.device, disk_dir: Path) -> str:
    """Everything that makes an old figure wrong: another machine, device, torch, disk, or meaning."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""
    while not disk_dir.exists() and disk_dir != disk_dir.parent:
        disk_dir = disk_dir.parent
    disk = os.stat(disk_dir).st_dev
    facts = (SCHEMA, platform.node(), machine, _device_name(device), torch.__version__, disk)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _load(path: Path) -> Measurements | None:
    try:
        data = json.loads(path.read_text())
        if data.pop("schema") != SCHEMA:
            return None
        link = tuple((int(size), float(out_s), float(in_s)) for size, out_s, in_s in data.pop("link"))
        measurements = Measurements(link=link, **data)
        for field in dataclasses.fields(Measurements):
            kinds = {"str": str, "int": int, "bool": bool, "float": (int, float)}
            kind = kinds.get(str(field.type), object)
            if not isinstance(getattr(measurements, field.name), kind):  # type: ignore[arg-type]
                raise TypeError(f"{field.name} is no {field.type}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.info("measuring again, the cache %s cannot be used: %s", path, error)
        return None
    return measurements


def _save(measurements: Measurements, path: Path) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(
            json.dumps({"schema": SCHEMA, **dataclasses.asdict(measurements)}, indent=1) + "\n"
        )
        unfinished.replace(path)  # a reader sees the old file or the new one, never half of one
    except OSError as error:
        _log.info("the measurements are not kept: %s", error)
        with contextlib.suppress(OSError):
            unfinished.unlink()
