"""Units: bytes and seconds as a person reads them."""

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


def _three(number: float) -> str:
    return f"{number:.{2 if abs(number) < 10 else 1 if abs(number) < 100 else 0}f}"
