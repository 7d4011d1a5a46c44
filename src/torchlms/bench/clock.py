"""Clock: seconds of one step, by the device's own events where it has them."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Clock(Protocol):
    """``start()`` before a step, ``stop()`` after it; the device is idle when ``stop`` returns."""

    def start(self) -> None: ...

    def stop(self) -> float: ...


class HostClock:
    """For the CPU, where an op has ended when its call returns."""

    def __init__(self) -> None:
        self._started_s = 0.0

    def start(self) -> None:
        self._started_s = time.perf_counter()

    def stop(self) -> float:
        return time.perf_counter() - self._started_s


class CudaClock:
    """Two events on the current stream; one synchronisation a step, at its end."""

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        self._start.record()

    def stop(self) -> float:
        self._stop.record()
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) / 1e3


def make_clock(device: torch.device) -> Clock:
    """The clock for a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
