"""Compaction: which blocks of device memory to move so that a hole of a given size opens.

Pure arithmetic on addresses: who owns the blocks, and how they are moved, is not known here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MOST_WINDOWS = 32  # looked at, cheapest first, until one is found whose blocks fit elsewhere


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of mapped device memory. ``movable`` means nothing for a free one."""

    address: int
    size_bytes: int
    free: bool
    movable: bool = False


# Blocks without a gap between them, by address.
Run = Sequence[Block]


@dataclass(frozen=True, slots=True)
class Window:
    """Addresses ``start`` to ``stop``, free once ``moves`` (largest first) are elsewhere."""

    start: int
    stop: int
    moves: tuple[Block, ...]

    @property
    def moved_bytes(self) -> int:
        return sum(block.size_bytes for block in self.moves)

    def contains(self, address: int) -> bool:
        return self.start <= address < self.stop


def first_misfit(runs: Sequence[Run], sizes_bytes: Sequence[int]) -> int | None:
    """The first of the blocks that finds no hole, if each in turn goes to the smallest that takes it."""
    holes = sorted(block.size_bytes for run in runs for block in run if block.free)
    for index, size_bytes in enumerate(sizes_bytes):
        if not _fill(holes, size_bytes):
            return index
    return None


def find_window(runs: Sequence[Run], size_bytes: int) -> Window | None:
    """The window of at least ``size_bytes`` with the fewest bytes to move, or None if there is none.

    A window without moves is a hole that is there already. The blocks to be moved are known to fit into
    holes outside the window if each goes, largest first, to the smallest hole that takes it.
    """
    windows = sorted(
        (window for run in runs for window in _windows(run, size_bytes)),
        key=lambda window: (window.moved_bytes, window.stop - window.start, window.start),
    )
    for window in windows[:_MOST_WINDOWS]:
        if _fits_elsewhere(window, runs):
            return window
    return None


def _windows(run: Run, size_bytes: int) -> Iterator[Window]:
    """Every window of whole blocks that is long enough and not longer than needed."""
    for first in range(len(run)):
        start, moves = run[first].address, []
        for block in run[first:]:
            if not block.free:
                if not block.movable:
                    break
                moves.append(block)
            stop = block.address + block.size_bytes
            if stop - start >= size_bytes:
                moves.sort(key=lambda block: -block.size_bytes)
                yield Window(start, stop, tuple(moves))
                break


def _fits_elsewhere(window: Window, runs: Sequence[Run]) -> bool:
    if not window.moves:
        return True
    holes = sorted(
        block.size_bytes for run in runs for block in run if block.free and not window.contains(block.address)
    )
    return all(_fill(holes, block.size_bytes) for block in window.moves)


def _fill(holes: list[int], size_bytes: int) -> bool:
    """Put a block into the smallest of the sorted ``holes`` that takes it, if there is one."""
    place = bisect_left(holes, size_bytes)
    if place == len(holes):
        return False
    insort(holes, holes.pop(place) - size_bytes)
    return True
