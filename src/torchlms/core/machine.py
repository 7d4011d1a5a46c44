"""Machine: the measured rates of one machine, and how long a copy of a given size takes on it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

from torchlms.core.record import load_record, save_record

SCHEMA = "torchlms.machine/1"


@dataclass(frozen=True, slots=True)
class CopyTime:
    """Seconds for one copy of ``size_bytes`` between device and pinned host memory, link otherwise idle."""

    size_bytes: int
    out_s: float
    in_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured once per machine and cached.

    ``link`` is sorted by size; it is empty on a machine whose "device" is the CPU, where values go
    straight to disk. ``out_share`` and ``in_share`` are the fractions of the lone rate that each
    direction keeps while both run. Rates are bytes per second; 0 means not measured.
    """

    device: str
    device_bytes: int
    torch: str
    link: tuple[CopyTime, ...] = ()
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
    memlock_bytes: int = -1  # -1: unlimited
    disk_free_bytes: int = 0
    measured: str = ""  # date, ISO 8601
    schema: str = SCHEMA

    def out_s(self, size_bytes: int) -> float:
        """Seconds to copy ``size_bytes`` from device to host, nothing else on the link."""
        return _interpolate([(point.size_bytes, point.out_s) for point in self.link], size_bytes)

    def in_s(self, size_bytes: int) -> float:
        """Seconds to copy ``size_bytes`` from host to device, nothing else on the link."""
        return _interpolate([(point.size_bytes, point.in_s) for point in self.link], size_bytes)

    def disk_write_s(self, size_bytes: int) -> float:
        return size_bytes / self.disk_write_bytes_per_s

    def disk_read_s(self, size_bytes: int) -> float:
        return size_bytes / self.disk_read_bytes_per_s

    def copies_s(self, size_bytes: int) -> float:
        """Seconds for ``size_bytes`` out and back, by the link or, without one, by the disk; infinite where
        there is neither."""
        if self.link:
            return self.out_s(size_bytes) + self.in_s(size_bytes)
        if not self.disk_write_bytes_per_s or not self.disk_read_bytes_per_s:
            return float("inf")
        return self.disk_write_s(size_bytes) + self.disk_read_s(size_bytes)

    def with_copies(self, speed: float) -> Machine:
        """The same machine, if every copy off the device and back went ``speed`` times as fast."""
        return replace(
            self,
            link=tuple(
                replace(point, out_s=point.out_s / speed, in_s=point.in_s / speed) for point in self.link
            ),
            disk_write_bytes_per_s=self.disk_write_bytes_per_s * speed,
            disk_read_bytes_per_s=self.disk_read_bytes_per_s * speed,
        )

    def save(self, path: str | Path) -> None:
        save_record(self, path)

    @staticmethod
    def load(path: str | Path) -> Machine:
        return load_record(Machine, path, schema=SCHEMA)


def _interpolate(points: list[tuple[int, float]], size_bytes: int) -> float:
    """Piecewise linear in size; below the first point its time (latency), above the last its rate."""
    if not points or size_bytes <= 0:
        return 0.0
    position = bisect_left(points, (size_bytes, 0.0))
    if position == 0:
        return points[0][1]
    if position == len(points):
        size, seconds = points[-1]
        return seconds * size_bytes / size
    (low, low_s), (high, high_s) = points[position - 1], points[position]
    return low_s + (high_s - low_s) * (size_bytes - low) / (high - low)
