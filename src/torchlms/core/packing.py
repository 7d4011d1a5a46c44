"""Packing: lifetimes to offsets, so that what lives at the same time never shares a byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

HOST_ALIGN_BYTES = 512
DISK_ALIGN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Lifetime:
    """``size_bytes`` in use over the moments ``start <= i <= stop``, both ends included."""

    size_bytes: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Packing:
    """One offset per lifetime, in the order given, and the bytes that hold them all."""

    offsets_bytes: tuple[int, ...]
    total_bytes: int


def pack(lifetimes: Sequence[Lifetime], *, align_bytes: int = HOST_ALIGN_BYTES) -> Packing:
    """Offsets without overlap, each a multiple of ``align_bytes``.

    Nested lifetimes (first in, last out, as activations are) come out at the lower bound. Others
    take the best of a few orders, which is not promised to be the optimum.
    """
    if not lifetimes:
        return Packing((), 0)
    best = _stacked(lifetimes, align_bytes)
    if best is not None:
        return best
    least_bytes = live_bytes(lifetimes, align_bytes=align_bytes)
    for order in _ORDERS:
        found = _first_fit(lifetimes, sorted(range(len(lifetimes)), key=_by(lifetimes, order)), align_bytes)
        if best is None or found.total_bytes < best.total_bytes:
            best = found
        if best.total_bytes <= least_bytes:
            break
    assert best is not None
    return best


def live_bytes(lifetimes: Sequence[Lifetime], *, align_bytes: int = HOST_ALIGN_BYTES) -> int:
    """The most aligned bytes in use at one moment: no packing needs less."""
    if not lifetimes:
        return 0
    steps: dict[int, int] = {}
    for lifetime in lifetimes:
        size_bytes = aligned(lifetime.size_bytes, align_bytes)
        steps[lifetime.start] = steps.get(lifetime.start, 0) + size_bytes
        steps[lifetime.stop + 1] = steps.get(lifetime.stop + 1, 0) - size_bytes
    live = most = 0
    for moment in sorted(steps):
        live += steps[moment]
        most = max(most, live)
    return most


def aligned(size_bytes: int, align_bytes: int) -> int:
    """``size_bytes`` rounded up."""
    return -(-size_bytes // align_bytes) * align_bytes


Order = Callable[[Lifetime], tuple[int, ...]]

# Longest first puts what surrounds under what is surrounded.
_ORDERS: tuple[Order, ...] = (
    lambda lifetime: (lifetime.start - lifetime.stop, -lifetime.size_bytes),
    lambda lifetime: (-lifetime.size_bytes, lifetime.start - lifetime.stop),
    lambda lifetime: (-lifetime.size_bytes * (lifetime.stop - lifetime.start + 1),),
    lambda lifetime: (lifetime.start, -lifetime.stop),
)


def _by(lifetimes: Sequence[Lifetime], order: Order) -> Callable[[int], tuple[int, ...]]:
    return lambda index: order(lifetimes[index])


def _stacked(lifetimes: Sequence[Lifetime], align_bytes: int) -> Packing | None:
    """Each on top of what surrounds it; None if some do not nest. What first fit finds, longest first, in a
    single pass."""
    offsets = [0] * len(lifetimes)
    around: list[tuple[int, int]] = []  # where each ends: moment, byte
    total_bytes = 0
    for index in sorted(range(len(lifetimes)), key=_by(lifetimes, _inwards)):
        lifetime = lifetimes[index]
        while around and around[-1][0] < lifetime.start:
            around.pop()
        if around and around[-1][0] < lifetime.stop:
            return None
        offsets[index] = around[-1][1] if around else 0
        end = offsets[index] + aligned(lifetime.size_bytes, align_bytes)
        around.append((lifetime.stop, end))
        total_bytes = max(total_bytes, end)
    return Packing(tuple(offsets), total_bytes)


def _inwards(lifetime: Lifetime) -> tuple[int, ...]:
    return lifetime.start, -lifetime.stop, -lifetime.size_bytes


def _first_fit(lifetimes: Sequence[Lifetime], order: Sequence[int], align_bytes: int) -> Packing:
    """Each in turn at the lowest offset that is free all through its lifetime."""
    placed = _Placed(len(lifetimes))
    offsets = [0] * len(lifetimes)
    for index in order:
        lifetime = lifetimes[index]
        size_bytes = aligned(lifetime.size_bytes, align_bytes)
        offsets[index] = placed.lowest_gap(lifetime, size_bytes)
        placed.add(lifetime, offsets[index], size_bytes)
    return Packing(tuple(offsets), placed.total_bytes)


class _Placed:
    """What has its place already, sorted by offset, in four parallel arrays."""

    def __init__(self, count: int) -> None:
        self._columns: Ints = np.zeros((4, count), dtype=np.int64)  # offset, end, start, stop
        self._count = 0
        self.total_bytes = 0

    def lowest_gap(self, lifetime: Lifetime, size_bytes: int) -> int:
        offset, end, start, stop = self._columns[:, : self._count]
        meets = ((start <= lifetime.stop) & (stop >= lifetime.start)).nonzero()[0]
        ceilings = offset[meets]
        if not len(meets) or ceilings[0] >= size_bytes:
            return 0
        floors = np.maximum.accumulate(end[meets])  # free from here to the next ceiling, the last one upwards
        fits = ceilings[1:] - floors[:-1] >= size_bytes
        first = int(fits.argmax()) if len(fits) else 0
        return int(floors[first] if len(fits) and fits[first] else floors[-1])

    def add(self, lifetime: Lifetime, offset: int, size_bytes: int) -> None:
        count = self._count
        place = int(np.searchsorted(self._columns[0, :count], offset))
        self._columns[:, place + 1 : count + 1] = self._columns[:, place:count].copy()
        self._columns[:, place] = (offset, offset + size_bytes, lifetime.start, lifetime.stop)
        self._count += 1
        self.total_bytes = max(self.total_bytes, offset + size_bytes)
