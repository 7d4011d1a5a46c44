"""Measurements: what the links, the host memory and the disk of this machine can do, in seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import statistics
import time
from concurrent.futures import wait
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import psutil  # type: ignore[import-untyped]
import torch

from torchlms.errors import LMSError
from torchlms.memory.arena import HUGE_PAGE_BYTES, Arena
from torchlms.memory.disk import SpillFile
from torchlms.memory.limits import disk_free_bytes, format_bytes, host_available_bytes, memlock_limit_bytes
from torchlms.memory.spill_place import directory_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

SCHEMA = "torchlms.probe/1"
CACHE_VARIABLE = "TORCHLMS_CACHE"

_LINK_SIZES_BYTES = tuple(1 << power for power in range(16, 29, 2))  # 64 KiB to 256 MiB
_BOTH_WAYS_BYTES = 32 << 20
_BOTH_WAYS_COPIES = 12
_HOST_BYTES = 128 << 20
_DISK_BYTES = 256 << 20
_DISK_PIECE_BYTES = 32 << 20
_DISK_LONGEST_S = 1.5  # each way
_REPEATS = 5

_cuda: Any = torch.cuda  # its classes carry types in some versions of torch and not in others
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
        parts.append(("link to the device", lambda: _measure_link(device)))
    parts.append(("host memory", _measure_host))
    parts.append(("disk", lambda: _measure_disk(disk_dir)))
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


def _measure_host() -> dict[str, Any]:
    size_bytes = _at_most(2 * _HOST_BYTES, host_available_bytes() // 4)
    with Arena(size_bytes, pinned=False) as arena:
        touch_s = arena.touch()
        half_bytes = arena.capacity_bytes // 2
        source, target = arena.view(0, half_bytes), arena.view(half_bytes, half_bytes)
        copy_s = _median_s(lambda: target.copy_(source))
        touched_bytes = arena.capacity_bytes
    return {
        "touch_bytes_per_s": touched_bytes / touch_s,
        "host_copy_bytes_per_s": half_bytes / copy_s,
    }


def _measure_disk(disk_dir: Path) -> dict[str, Any]:
    size_bytes = _at_most(_DISK_BYTES, min(disk_free_bytes(disk_dir) // 4, host_available_bytes() // 8))
    with SpillFile(disk_dir, size_bytes) as spill, Arena(size_bytes, pinned=False) as arena:
        if spill.allocate(size_bytes) is None:
            raise LMSError(f"no room for {format_bytes(size_bytes)} in {disk_dir}")
        # Random bytes: a disk or filesystem that compresses would shine on zeros.
        arena.view(0, arena.capacity_bytes).view(torch.int64).random_(generator=torch.Generator())
        moved_bytes, write_s = _stream(spill.write, arena, size_bytes)
        begin_s = time.perf_counter()
        spill.flush()
        if not spill.direct:  # the page cache took it at once; the disk takes its time now
            write_s += time.perf_counter() - begin_s
        read_bytes, read_s = _stream(spill.read, arena, moved_bytes)
        return {
            "disk_write_bytes_per_s": moved_bytes / write_s,
            "disk_read_bytes_per_s": read_bytes / read_s,
            "disk_direct": spill.direct,
        }


def _stream(
    move: Callable[[int, torch.Tensor], Future[None]], arena: Arena, size_bytes: int
) -> tuple[int, float]:
    """Move bytes in order, two pieces in flight, until all are moved or the time is up: (bytes, seconds)."""
    begin_s = time.perf_counter()
    flying: list[Future[None]] = []
    moved_bytes = 0
    # However slow the disk, the first piece is moved: no rate at all would be of no use.
    while moved_bytes < size_bytes and (not flying or time.perf_counter() - begin_s < _DISK_LONGEST_S):
        piece_bytes = min(_DISK_PIECE_BYTES, size_bytes - moved_bytes)
        flying.append(move(moved_bytes, arena.view(moved_bytes, piece_bytes)))
        moved_bytes += piece_bytes
        if len(flying) > 1:
            flying.pop(0).result()
    wait(flying)
    for future in flying:
        future.result()
    return moved_bytes, time.perf_counter() - begin_s


def _measure_link(device: torch.device) -> dict[str, Any]:
    with torch.cuda.device(device):
        free_bytes = torch.cuda.mem_get_info()[0]
        largest_bytes = _at_most(_LINK_SIZES_BYTES[-1], min(free_bytes // 4, host_available_bytes() // 8))
        try:
            return _measure_link_with(device, largest_bytes)
        finally:
            torch.cuda.empty_cache()  # what the probe reserved would count against somebody's budget


def _measure_link_with(device: torch.device, largest_bytes: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    there = torch.empty(2 * largest_bytes, dtype=torch.uint8, device=device)
    device_out, device_in = there[:largest_bytes], there[largest_bytes:]
    with Arena(2 * largest_bytes, pinned=True) as arena:
        host_out, host_in = arena.view(0, largest_bytes), arena.view(largest_bytes, largest_bytes)
        if arena.pinned:
            found["pin_bytes_per_s"] = arena.capacity_bytes / arena.register_s
        link = []
        for size_bytes in (size for size in _LINK_SIZES_BYTES if size <= largest_bytes):
            end = slice(0, size_bytes)
            out_s = _event_s(host_out[end], device_out[end])
            link.append((size_bytes, out_s, _event_s(device_in[end], host_in[end])))
        found["link"] = tuple(link)
        size_bytes = min(_BOTH_WAYS_BYTES, largest_bytes)
        copies = (
            (host_out[:size_bytes], device_out[:size_bytes]),
            (device_in[:size_bytes], host_in[:size_bytes]),
        )
        found["out_share"], found["in_share"] = _both_ways(*copies)
        torch.cuda.synchronize()
    size_bytes = min(64 << 20, largest_bytes)
    pageable = torch.zeros(size_bytes, dtype=torch.uint8)
    found["pageable_out_bytes_per_s"] = size_bytes / _median_s(
        lambda: pageable.copy_(device_out[:size_bytes])
    )
    found["pageable_in_bytes_per_s"] = size_bytes / _median_s(lambda: device_in[:size_bytes].copy_(pageable))
    return found


def _both_ways(
    out: tuple[torch.Tensor, torch.Tensor], into: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """The share of its lone rate that each direction keeps while both run."""
    lone_s = [_queue_s([pair])[0] for pair in (out, into)]
    both_s = _queue_s([out, into])
    first = 0 if both_s[0] <= both_s[1] else 1
    last = 1 - first
    # The first to finish had company all along. The other then ran alone, at its lone rate:
    # only what it had moved until then tells its share.
    alone = (both_s[last] - both_s[first]) / lone_s[last]
    share = [0.0, 0.0]
    share[first] = lone_s[first] / both_s[first]
    share[last] = max(0.0, 1.0 - alone) * lone_s[last] / both_s[first]
    return min(1.0, share[0]), min(1.0, share[1])


def _queue_s(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Seconds until each (target, source) has been copied a dozen times, all started at once."""
    streams = [_cuda.Stream() for _ in pairs]
    start = _cuda.Event(enable_timing=True)
    ends = [_cuda.Event(enable_timing=True) for _ in pairs]
    torch.cuda.synchronize()
    start.record()
    for stream in streams:
        stream.wait_event(start)
    for _ in range(_BOTH_WAYS_COPIES):
        for stream, (target, source) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
    for stream, end in zip(streams, ends, strict=True):
        end.record(stream)
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) / 1000 for end in ends]


def _event_s(target: torch.Tensor, source: torch.Tensor) -> float:
    """Median seconds of one copy on an idle link, by device events."""
    times = []
    for _ in range(_REPEATS + 1):
        begin, end = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1000)
    return statistics.median(times[1:])  # the first one warms up


def _median_s(run: Callable[[], object]) -> float:
    """Median seconds of something that blocks until it is done."""
    times: list[float] = []
    for _ in range(_REPEATS + 1):
        begin_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times[1:])


def _at_most(wanted_bytes: int, bound_bytes: int) -> int:
    """A whole number of huge pages, at least one."""
    return max(1, min(wanted_bytes, bound_bytes) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


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
