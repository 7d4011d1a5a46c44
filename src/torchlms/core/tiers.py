"""Tiers: which moves fit into host memory, which go on to disk, and where each lies there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchlms.core.packing import DISK_ALIGN_BYTES, HOST_ALIGN_BYTES, Lifetime, aligned, live_bytes, pack
from torchlms.core.units import bytes_text
from torchlms.errors import HostBudgetTooSmall

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from torchlms.core.moves import Move

# A value on its way between disk and link lies in host memory: one in each of two halves.
STAGING_HALVES = 2


@dataclass(frozen=True, slots=True)
class Room:
    """Where values may go. ``host_bytes`` is 0 without a link, ``disk_bytes`` 0 without a usable disk."""

    host_bytes: int
    disk_bytes: int
    has_link: bool


@dataclass(frozen=True, slots=True)
class Places:
    """Offset of every move in its tier, and the size of both. The arena ends with the staging halves."""

    on_disk: frozenset[Move]
    offsets_bytes: dict[Move, int]
    arena_bytes: int
    spill_bytes: int


def choose_disk(moves: Sequence[Move], room: Room) -> frozenset[Move]:
    """The moves for which host memory has no room: longest idle first, the slowest tier wants most slack.

    Counts live bytes, a lower bound on what packing needs. HostBudgetTooSmall when neither tier fits.
    """
    if not room.has_link:
        on_disk = frozenset(moves)
    else:
        on_disk = _overflow(moves, room)
    missing_bytes = live_bytes(_lifetimes(on_disk), align_bytes=DISK_ALIGN_BYTES) - room.disk_bytes
    if missing_bytes > 0:
        raise _too_small(missing_bytes, moves, room)
    return on_disk


def place(moves: Sequence[Move], room: Room, on_disk: frozenset[Move]) -> Places:
    """Offsets for everything. HostBudgetTooSmall, with what packing lost, when they do not fit."""
    host = [move for move in moves if move not in on_disk]
    disk = [move for move in moves if move in on_disk]
    arena = pack(_lifetimes(host), align_bytes=HOST_ALIGN_BYTES)
    spill = pack(_lifetimes(disk), align_bytes=DISK_ALIGN_BYTES)
    arena_bytes = arena.total_bytes + _staging_bytes(disk, room)
    missing_bytes = max(
        arena_bytes - room.host_bytes if room.has_link else 0, spill.total_bytes - room.disk_bytes
    )
    if missing_bytes > 0:
        raise _too_small(missing_bytes, moves, room)
    offsets = dict(zip(host + disk, arena.offsets_bytes + spill.offsets_bytes, strict=True))
    return Places(on_disk, offsets, arena_bytes, spill.total_bytes)


def place_all(moves: Sequence[Move], room: Room) -> Places:
    """``choose_disk``, then ``place``; what packing loses is made up by sending more to disk."""
    target = room
    while True:
        on_disk = choose_disk(moves, target)
        try:
            return place(moves, room, on_disk)
        except HostBudgetTooSmall as error:
            if target.host_bytes <= 0 or len(on_disk) == len(moves):
                raise
            target = replace(target, host_bytes=max(0, target.host_bytes - error.missing_bytes))


def _overflow(moves: Sequence[Move], room: Room) -> frozenset[Move]:
    """Moves sent to disk, one by one, until the rest and the staging fit into host memory."""
    if sum(aligned(move.size_bytes, HOST_ALIGN_BYTES) for move in moves) <= room.host_bytes:
        return frozenset()  # also all at once: no need to look closer
    by_idle = sorted(moves, key=lambda move: move.idle_s, reverse=True)

    def missing_bytes(count: int) -> int:
        staying_bytes = live_bytes(_lifetimes(by_idle[count:]), align_bytes=HOST_ALIGN_BYTES)
        return staying_bytes + _staging_bytes(by_idle[:count], room) - room.host_bytes

    if missing_bytes(0) <= 0:
        return frozenset()
    if room.disk_bytes <= 0:
        raise _too_small(missing_bytes(0), moves, room)
    low, high = 0, len(by_idle)  # too few, perhaps enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if missing_bytes(middle) <= 0 else (middle, high)
    if missing_bytes(high) > 0:
        raise _too_small(missing_bytes(high), moves, room)
    return frozenset(by_idle[:high])


def _staging_bytes(on_disk: Iterable[Move], room: Room) -> int:
    if not room.has_link:
        return 0
    largest_bytes = max((move.size_bytes for move in on_disk), default=0)
    return STAGING_HALVES * aligned(largest_bytes, DISK_ALIGN_BYTES)


def _lifetimes(moves: Collection[Move]) -> list[Lifetime]:
    return [Lifetime(move.size_bytes, move.start, move.stop) for move in moves]


def _too_small(missing_bytes: int, moves: Sequence[Move], room: Room) -> HostBudgetTooSmall:
    leaving_bytes = live_bytes(_lifetimes(moves))
    host = f"host memory ({bytes_text(room.host_bytes)}) and " if room.host_bytes else ""
    return HostBudgetTooSmall(
        f"up to {bytes_text(leaving_bytes)} must leave the device at once, but {host}disk "
        f"({bytes_text(room.disk_bytes)}) {'lack' if host else 'lacks'} {bytes_text(missing_bytes)} for it: "
        "raise the host or disk budget, or the device budget",
        missing_bytes=missing_bytes,
    )
