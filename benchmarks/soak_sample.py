"""Sample: one look at a process that trains, how far its figures may grow, and which have grown further."""

from __future__ import annotations

import gc
import os
import statistics
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import torchlms
from torchlms.memory.arena import pinned_bytes_in_use

MIB = 1 << 20
FEWEST = 4  # samples: one for each quarter


@dataclass(frozen=True, slots=True)
class Sample:
    """What there is between two steps, on every tier."""

    step: int
    step_s: float  # median since the sample before
    rss_bytes: int
    device_bytes: int  # of live tensors
    reserved_bytes: int  # by the caching allocator
    host_bytes: int  # arenas and slabs
    pinned_bytes: int
    spill_bytes: int  # in use
    spill_file_bytes: int  # that the files take
    objects: int  # that the collector knows
    threads: int
    open_files: int


@dataclass(frozen=True, slots=True)
class Bound:
    """How much a figure may grow from the second quarter of a run to the last: by ``factor``, and ``slack``
    besides. The first quarter still records and plans."""

    factor: float
    slack: float = 0

    def holds(self, before: float, after: float) -> bool:
        return after <= self.factor * before + self.slack


BOUNDS = {
    "step_s": Bound(1.15),
    "rss_bytes": Bound(1.05, 16 * MIB),  # malloc gives back late
    "device_bytes": Bound(1.01, 64 << 10),
    "reserved_bytes": Bound(1.05, 256 * MIB),  # holes come and go under the cap
    "host_bytes": Bound(1.01, 1 << 30),  # one slab for an emergency
    "pinned_bytes": Bound(1.05),
    "spill_bytes": Bound(1.01, 64 << 10),
    "spill_file_bytes": Bound(1.01),
    "objects": Bound(1.02, 2000),
    "threads": Bound(1, 1),  # a pool starts its threads as it needs them
    "open_files": Bound(1, 1),
}


def look(step: int, step_s: float, lms: torchlms.LMS, disk_dir: Path) -> Sample:
    gc.collect()
    assert lms._engine is not None
    engine, cuda = lms._engine, lms._engine.device.is_cuda
    spill = engine.store.spill
    return Sample(
        step=step,
        step_s=round(step_s, 5),
        rss_bytes=psutil.Process().memory_info().rss,
        device_bytes=engine.device.allocated_bytes(),
        reserved_bytes=torch.cuda.memory_reserved() if cuda else 0,
        host_bytes=engine.store.host_bytes(),
        pinned_bytes=pinned_bytes_in_use(),
        spill_bytes=spill.in_use_bytes if spill is not None else 0,
        spill_file_bytes=sum(path.stat().st_blocks * 512 for path in disk_dir.rglob("*") if path.is_file()),
        objects=len(gc.get_objects()),
        threads=threading.active_count(),
        open_files=open_files(),
    )


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def growth(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """Each bounded figure's median in the second quarter and in the last."""
    quarter = max(1, len(samples) // 4)
    parts = samples[quarter : 2 * quarter], samples[-quarter:]
    return {name: (_median(parts[0], name), _median(parts[1], name)) for name in BOUNDS}


def grown(samples: list[Sample]) -> list[str]:
    """In words, what has grown beyond its bound."""
    return [
        f"{name} grew from {before:g} to {after:g}, more than {bound.factor:g} times and {bound.slack:g}"
        for name, (before, after) in growth(samples).items()
        if not (bound := BOUNDS[name]).holds(before, after)
    ]


def _median(samples: list[Sample], name: str) -> float:
    values: list[Any] = [getattr(sample, name) for sample in samples]
    return float(statistics.median(values))
