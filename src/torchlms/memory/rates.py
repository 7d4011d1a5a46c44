"""Rates: how fast host memory, disk and the link to the device are, each measured in about a second."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchlms.errors import LMSError
from torchlms.memory.arena import HUGE_PAGE_BYTES, Arena
from torchlms.memory.disk import SpillFile
from torchlms.memory.limits import disk_free_bytes, format_bytes, host_available_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

_LINK_SIZES_BYTES = tuple(1 << power for power in range(16, 29, 2))  # 64 KiB to 256 MiB
_BOTH_WAYS_BYTES = 32 << 20
_BOTH_WAYS_COPIES = 12
_HOST_BYTES = 128 << 20
_DISK_BYTES = 256 << 20
_DISK_PIECE_BYTES = 32 << 20
_DISK_LONGEST_S = 1.5  # each way
_REPEATS = 5

_cuda: Any = torch.cuda  # its classes carry types in some versions of torch and not in others


def measure_host() -> dict[str, Any]:
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


def measure_disk(disk_dir: Path) -> dict[str, Any]:
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


def measure_link(device: torch.device) -> dict[str, Any]:
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
