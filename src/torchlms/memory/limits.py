"""Limits: how many bytes host memory and disk can still give, and how users write such numbers."""

from __future__ import annotations

import math
import numbers
import os
import re
import resource
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]

from torchlms.errors import BadOption

if TYPE_CHECKING:
    from collections.abc import Iterator

UNLIMITED = -1
_NO_SIZE = 1 << 63  # beyond what a pointer reaches

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")
_FACTORS: dict[str, int] = {
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY_UNITS)},
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL_UNITS)},
    "": 1,
    "bytes": 1,
}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)\s*([a-z%]*)", re.IGNORECASE | re.ASCII)
_EXAMPLES = "write a number of bytes, '16GiB' (2^30 each), '16GB' (10^9 each) or '80%'"


def host_available_bytes(
    *, proc_root: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that this process can still take before something refuses or kills it.

    The least of: what the kernel calls available, what each enclosing memory cgroup (v2 or v1)
    has left, and what RLIMIT_AS leaves of the address space. A snapshot, not a reservation:
    others on the machine can take it first.
    """
    bounds = [int(psutil.virtual_memory().available)]
    bounds += _cgroup_left_bytes(proc_root, cgroup_root)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        bounds.append(address_space - int(psutil.Process().memory_info().vms))
    return max(0, min(bounds))


def memlock_limit_bytes() -> int:
    """RLIMIT_MEMLOCK of this process, ``UNLIMITED`` (-1) when there is none.

    What it means for pinned memory depends on the driver: NVIDIA's pins pages in the kernel and
    commonly does not charge this limit, so a small figure is a warning, not a reason to refuse.
    Whoever pins tries, and falls back when the driver says no.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return UNLIMITED if limit == resource.RLIM_INFINITY else limit


def disk_free_bytes(path: Path) -> int:
    """Bytes an unprivileged user can still write at ``path``, or at its nearest parent that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def parse_bytes(value: str | int | float, *, whole_bytes: int | None = None) -> int:
    """Read a size: bytes, ``"16GiB"`` (2^30), ``"16 GB"`` (10^9), or ``"80%"`` of ``whole_bytes``.

    Case does not matter and fractions are rounded down to whole bytes. Raises BadOption, quoting
    the input, for whatever is not a positive size; a bare ``"16G"`` is refused, as it could mean either.
    """
    if isinstance(value, str):
        size = _parse_text(value, whole_bytes)
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadOption(f"cannot read {value!r} as a size: {_EXAMPLES}")
    elif isinstance(value, numbers.Integral):
        size = Fraction(int(value))
    elif not math.isfinite(value):
        raise BadOption(f"a size must be a finite number, not {value!r}: {_EXAMPLES}")
    else:
        size = Fraction(float(value))
    if size <= 0:
        raise BadOption(f"a size must be more than zero, not {value!r}: {_EXAMPLES}")
    if size < 1:
        raise BadOption(f"{value!r} is less than one byte; for a share of the whole write '80%', not 0.8")
    if size >= _NO_SIZE:
        raise BadOption(f"no memory has as many bytes as {str(value)[:20]!r} says: {_EXAMPLES}")
    return int(size)


def parse_option(
    option: str, value: str | int | float, *, whole_bytes: int | None = None, or_none: bool = False
) -> int:
    """As ``parse_bytes``; errors name the ``option``. ``or_none``: 0 may be said, too, for none at all."""
    if or_none and not isinstance(value, bool) and str(value).strip() == "0":
        return 0
    try:
        return parse_bytes(value, whole_bytes=whole_bytes)
    except BadOption as error:
        raise BadOption(f"{option}: {error}") from None


def format_bytes(size_bytes: float, *, up: bool = False) -> str:
    """``17072495001`` as ``"15.9 GiB"``; below 1 KiB in whole bytes. ``up``: rounded up, for what has to be
    enough."""
    if abs(size_bytes) < 1024:
        return f"{int(size_bytes)} B"
    scaled = float(size_bytes)
    for unit in _BINARY_UNITS[1:]:
        scaled /= 1024
        # 1023.95 and up would print as 1024.0 of this unit.
        if abs(scaled) < 1023.95 or unit == _BINARY_UNITS[-1]:
            break
    return f"{math.ceil(scaled * 10) / 10 if up else scaled:.1f} {unit}"


def _parse_text(text: str, whole_bytes: int | None) -> Fraction:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise BadOption(f"cannot read {text!r} as a size: {_EXAMPLES}")
    number, unit = Fraction(str(match[1])), str(match[2]).lower()
    if unit == "%":
        return _parse_percent(text, number, whole_bytes)
    if unit not in _FACTORS:
        letter = unit.upper()
        either = f"did you mean '{match[1]}{letter}iB' or '{match[1]}{letter}B'?"
        raise BadOption(f"unknown unit in {text!r}: {either if letter in tuple('KMGTP') else _EXAMPLES}")
    return number * _FACTORS[unit]


def _parse_percent(text: str, percent: Fraction, whole_bytes: int | None) -> Fraction:
    if percent > 100:
        raise BadOption(f"{text!r} is more than the whole: a percentage lies above 0% and up to 100%")
    if whole_bytes is None:
        raise BadOption(f"{text!r} has no whole to be a share of here: write '16GiB' or '16GB'")
    return percent * whole_bytes / 100


def _cgroup_left_bytes(proc_root: Path, cgroup_root: Path) -> Iterator[int]:
    """What is left under the limit of this process' memory cgroup and of each one around it."""
    limit_names: tuple[str, ...]
    for line in _read_text(proc_root / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # v2: one hierarchy
            roots = [cgroup_root, cgroup_root / "unified"]
            limit_names = ("memory.max", "memory.high")
            usage_name, cache_name = "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # v1
            roots = [cgroup_root / "memory"]
            limit_names = ("memory.limit_in_bytes",)
            usage_name, cache_name = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # In a container the path can name the host's view and not exist here; the walk passes
        # through what is missing and still meets the mounted root. Parts like ".." are not ours.
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for root in roots:
            for depth in range(len(parts), -1, -1):
                group = root.joinpath(*parts[:depth])
                left = _left_in_group(group, limit_names, usage_name, cache_name)
                if left is not None:
                    yield left


def _left_in_group(group: Path, limit_names: tuple[str, ...], usage_name: str, cache_name: str) -> int | None:
    limits = [limit for name in limit_names if (limit := _read_int(group / name)) is not None]
    usage_bytes = _read_int(group / usage_name)
    if not limits or usage_bytes is None:
        return None
    # Page cache that nobody has touched lately is charged to the group, yet is given up before
    # anything is killed; without this a group that has read a large file looks full.
    return min(limits) - usage_bytes + min(usage_bytes, _stat_bytes(group, cache_name))


def _stat_bytes(group: Path, name: str) -> int:
    for line in _read_text(group / "memory.stat").splitlines():
        key, _, figure = line.partition(" ")
        if key == name and figure.strip().isdigit():
            return int(figure)
    return 0


def _read_int(path: Path) -> int | None:
    text = _read_text(path).strip()  # "max" means no limit
    return int(text) if text.isdigit() else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
