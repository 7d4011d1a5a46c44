"""Units: bytes, seconds and counts as a person reads them."""

from __future__ import annotations

_STEPS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def bytes_text(size_bytes: int) -> str:
    """``5.32 GiB``, ``340 MiB``, ``12 bytes``: three significant figures."""
    for unit, unit_bytes in _STEPS:
        if abs(size_bytes) >= unit_bytes:
            return f"{_three(size_bytes / unit_bytes)} {unit}"
    return f"{size_bytes} bytes"


def seconds_text(seconds: float) -> str:
    """``1.25 s``, ``31.0 ms``, ``250 us``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if abs(seconds) * scale >= 1:
            return f"{_three(seconds * scale)} {unit}"
    return f"{_three(seconds * 1e6)} us"


def rounded_up(size_bytes: int) -> int:
    """A budget to recommend: by a thousandth at most more than ``size_bytes``, for the little that a loop
    keeps of one step and not of another, such as a loss."""
    grain_bytes = 1 << max(0, size_bytes.bit_length() - 11)
    return -(-size_bytes // grain_bytes) * grain_bytes


def counted(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _three(number: float) -> str:
    return f"{number:.{2 if abs(number) < 10 else 1 if abs(number) < 100 else 0}f}"
