"""Axis: round numbers along an axis, each with its place and its label."""

from __future__ import annotations

import math
from dataclasses import dataclass

_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("bytes", 1))
_TIMES = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


@dataclass(frozen=True, slots=True)
class Tick:
    """``share`` of the axis, from its beginning."""

    share: float
    label: str


def bytes_ticks(most: float, *, least: float = 0.0, wanted: int = 5) -> tuple[Tick, ...]:
    unit, size = next((pair for pair in _UNITS if most >= pair[1]), _UNITS[-1])
    return _ticks(least / size, most / size, unit, wanted)


def seconds_ticks(most: float, *, wanted: int = 8) -> tuple[Tick, ...]:
    unit, size = next((pair for pair in _TIMES if most >= pair[1]), _TIMES[-1])
    return _ticks(0.0, most / size, unit, wanted)


def share_ticks() -> tuple[Tick, ...]:
    """Of a share of 1."""
    return tuple(Tick(part / 4, f"{part * 25}%") for part in range(5))


def _ticks(least: float, most: float, unit: str, wanted: int) -> tuple[Tick, ...]:
    reach = most - least
    if reach <= 0:
        return (Tick(0.0, f"{least:g} {unit}"),)
    rough = reach / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(least / apart - 1e-9)
    last = math.floor(most / apart + 1e-9)
    return tuple(
        Tick((number * apart - least) / reach, f"{number * apart:.6g} {unit}")
        for number in range(first, last + 1)
    )
