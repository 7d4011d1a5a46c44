"""Compaction: which blocks of device memory to move so that a hole of a given size opens.

Pure arithmetic on addresses: who owns the blocks, and how they are moved, is not known here.

[Note: Where the allocator puts a block]
Into the smallest hole that takes it, with an exception. A hole with unmapped addresses behind it could grow
into them. The allocator spares such a hole where the next larger one, with what lies behind that, is smaller
than it with what lies behind it; and so on from hole to hole. It does so whether or not the cap leaves
anything to grow by (``get_free_block`` of PyTorch's ``CUDACachingAllocator.cpp``). So a result may take the
one large hole, and leave the workspace after it two smaller ones.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_MOST_WINDOWS = 32  # looked at, cheapest first, until one is found whose blocks fit elsewhere


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of mapped device memory. ``movable`` means nothing for a free one; ``spare_bytes`` is what lies
    unmapped right behind it, if it could grow into that."""

    address: int
    size_bytes: int
    free: bool
    movable: bool = False
    spare_bytes: int = 0


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


class _Hole(NamedTuple):
    """A free block, in the allocator's order."""

    size_bytes: int
    address: int
    spare_bytes: int

    @property
    def reach_bytes(self) -> int:
        return self.size_bytes + self.spare_bytes


def first_misfit(runs: Sequence[Run], sizes_bytes: Sequence[int]) -> int | None:
    """The first of the blocks that finds no hole, if each in turn goes where the allocator puts it."""
    holes = _holes(block for run in runs for block in run)
    for index, size_bytes in enumerate(sizes_bytes):
        if not _fill(holes, size_bytes):
            return index
    return None


def find_window(runs: Sequence[Run], size_bytes: int) -> Window | None:
    """The window of at least ``size_bytes`` with the fewest bytes to move, or None if there is none.

    A window without moves is a hole that is there already. The blocks to be moved are known to fit into
    holes outside the window if each in turn, largest first, goes where the allocator puts it.
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
    holes = _holes(block for run in runs for block in run if not window.contains(block.address))
    return all(_fill(holes, block.size_bytes) for block in window.moves)


def _holes(blocks: Iterable[Block]) -> list[_Hole]:
    return sorted(_Hole(block.size_bytes, block.address, block.spare_bytes) for block in blocks if block.free)


def _fill(holes: list[_Hole], size_bytes: int) -> bool:
    """Put a block into one of the sorted ``holes`` as the allocator would, if any takes it."""
    place = bisect_left(holes, (size_bytes,))
    if place == len(holes):
        return False
    while place + 1 < len(holes) and holes[place + 1].reach_bytes < holes[place].reach_bytes:
        place += 1
    hole = holes.pop(place)
    insort(holes, _Hole(hole.size_bytes - size_bytes, hole.address + size_bytes, hole.spare_bytes))
    return True
