"""Host: memory and disk for what leaves the device, and the limits that hold them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from torchlms.doctor.finding import Finding, attention, fine, note
from torchlms.memory import limits
from torchlms.memory.limits import UNLIMITED, format_bytes
from torchlms.memory.probe import Measurements, cache_directory
from torchlms.memory.spill_place import filesystem_type

_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "9p", "fuse.sshfs", "fuse.s3fs")
_LIMITED = 0.95  # of what is free: below it, some limit holds
_LEAST_BYTES = 1 << 30
_LITTLE_DISK_BYTES = 10 << 30
_SMALL_MEMLOCK_BYTES = 1 << 30


def host_memory(available_bytes: int, free_bytes: int, device_bytes: int) -> Finding:
    """``available_bytes``: within every limit; ``free_bytes``: as the machine says; 0 for no device."""
    said = f"{format_bytes(available_bytes)} to be had"
    limited = available_bytes < _LIMITED * free_bytes
    if limited:
        said += f", for a cgroup or ulimit -v holds it below the {format_bytes(free_bytes)} that are free"
    raise_limit = "give the container or job more memory, " if limited else "end other processes, "
    if available_bytes < max(_LEAST_BYTES, device_bytes // 4):
        return attention("host memory", said, f"{raise_limit}or let values go to disk with --disk-dir")
    if limited:
        return note("host memory", said, "if a run says HostBudgetTooSmall, give the container more memory")
    return fine("host memory", said)


def locked_memory(limit_bytes: int, *, cuda: bool) -> Finding:
    if limit_bytes == UNLIMITED:
        return fine("memlock", "unlimited")
    said = f"RLIMIT_MEMLOCK is {format_bytes(limit_bytes)}"
    if not cuda or limit_bytes >= _SMALL_MEMLOCK_BYTES:
        return fine("memlock", said)
    return note(
        "memlock",
        f"{said}; NVIDIA's driver commonly does not count against it",
        "only if the link rate above says that memory could not be pinned: ulimit -l unlimited",
    )


def disk(folder: Path, kind: str, free_bytes: int, *, missing: Path | None = None) -> Finding:
    """Where values go that host memory cannot hold: ``folder``, or what will be made in it."""
    said = f"{folder} ({kind or 'unknown filesystem'}), {format_bytes(free_bytes)} free"
    if missing is not None:
        said += f", in which LMS would make {missing}"
    elsewhere = "name a folder on a local disk with --disk-dir"
    if not os.access(folder, os.W_OK):
        return attention("disk", f"{said}: no permission to write", elsewhere)
    if kind in _MEMORY:
        return attention("disk", f"{said}: that is host memory, not a disk", elsewhere)
    if free_bytes < _LEAST_BYTES:
        return attention("disk", said, f"make room, or {elsewhere}")
    if kind in _NETWORK:
        return note("disk", f"{said}: on the network, slow and shared", elsewhere)
    if free_bytes < _LITTLE_DISK_BYTES:
        return note("disk", said, f"make room, or {elsewhere}, if host memory will not suffice")
    return fine("disk", said)


def rates(measured: Measurements | None) -> Iterator[Finding]:
    """What the probe found, if it has run here."""
    if measured is None:
        yield note("disk rate", "not measured yet", "torchlms probe (seconds; LMS does it when first used)")
        return
    write, read = measured.disk_write_bytes_per_s, measured.disk_read_bytes_per_s
    if not write or not read:
        next_step = "torchlms probe --refresh says why"
        yield attention("disk rate", "could not be measured: no disk is used", next_step)
        return
    said = f"{write / 1e9:.2f} GB/s out, {read / 1e9:.2f} GB/s in (measured {measured.measured[:10]})"
    if measured.disk_direct:
        yield fine("disk rate", said)
    else:
        yield note("disk rate", f"{said}, by way of the page cache, which takes host memory")


def cache(folder: Path) -> Finding:
    """Where measurements are kept; without it each start measures anew."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return fine("cache", str(folder))
    return attention(
        "cache",
        f"{folder} cannot be written: every start measures this machine again, for seconds",
        "set TORCHLMS_CACHE to a folder of yours",
    )


def host_findings(folder: Path, *, device_bytes: int, measured: Measurements | None) -> Iterator[Finding]:
    free_bytes = int(psutil.virtual_memory().available)
    yield host_memory(limits.host_available_bytes(), free_bytes, device_bytes)
    yield locked_memory(limits.memlock_limit_bytes(), cuda=device_bytes > 0)
    wanted = there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    missing = wanted if there != wanted else None
    yield disk(there, filesystem_type(there), limits.disk_free_bytes(there), missing=missing)
    yield from rates(measured)
    yield cache(cache_directory())
