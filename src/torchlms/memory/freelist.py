"""FreeList: which offsets of one range are taken; best fit, with neighbours merged when freed."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections import deque


class FreeList:
    """Hands out offsets in ``[0, capacity_bytes)``; holds no memory itself.

    Every offset is a multiple of ``alignment`` and every size is rounded up to one, so
    ``in_use_bytes`` counts what is taken, not what was asked for. A size of 0 takes one unit:
    two live blocks never share an offset.

    Safe to call from any thread, and ``free`` also from a finalizer: the collector may run one in the
    middle of ``allocate``, on the same thread, where waiting for a lock would be for ever.
    """

    def __init__(self, capacity_bytes: int, alignment: int) -> None:
        if capacity_bytes < 0 or alignment < 1:
            raise ValueError(f"capacity {capacity_bytes} must be >= 0 and alignment {alignment} >= 1")
        self.capacity_bytes = capacity_bytes // alignment * alignment
        self.alignment = alignment
        self.in_use_bytes = 0
        self.peak_bytes = 0
        self._lock = threading.Lock()
        self._taken: dict[int, int] = {}
        self._returned: deque[tuple[int, int]] = deque()  # freed, not yet merged
        # The same free blocks three ways: by offset, by (size, offset), and the size of each.
        self._starts: list[int] = []
        self._by_size: list[tuple[int, int]] = []
        self._free: dict[int, int] = {}
        if self.capacity_bytes:
            self._add_free(0, self.capacity_bytes)

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def largest_free_bytes(self) -> int:
        """The largest size that ``allocate`` would grant now."""
        self._merge_returned()
        return self._by_size[-1][0] if self._by_size else 0

    def size_of(self, offset: int) -> int:
        """The rounded size of the block taken at ``offset``; KeyError when there is none."""
        return self._taken[offset]

    def allocate(self, size: int) -> int | None:
        """Take the smallest free block that holds ``size`` (the lowest of equals); None when none does."""
        size = self._round_up(size)
        self._merge_returned()
        with self._lock:
            position = bisect_left(self._by_size, (size, 0))
            if position == len(self._by_size):
                return None
            offset = self._by_size[position][1]
            self._take(offset, offset, size)
            return offset

    def reserve(self, offset: int, size: int) -> bool:
        """Take exactly ``[offset, offset + size)``; False, and nothing taken, when part of it is not free."""
        if offset % self.alignment:
            raise ValueError(f"offset {offset} is not a multiple of {self.alignment}")
        size = self._round_up(size)
        self._merge_returned()
        with self._lock:
            position = bisect_right(self._starts, offset) - 1
            if position < 0:
                return False
            start = self._starts[position]
            if offset + size > start + self._free[start]:
                return False
            self._take(start, offset, size)
            return True

    def free(self, offset: int) -> None:
        """Give back the block at ``offset``; KeyError when none was taken there."""
        self._returned.append((offset, self._taken.pop(offset)))
        self._merge_returned()

    def _merge_returned(self) -> None:
        # Whoever does not get the lock leaves; its holder looks again after letting go.
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._merge(*self._returned.popleft())
            finally:
                self._lock.release()

    def _merge(self, offset: int, size: int) -> None:
        self.in_use_bytes -= size
        position = bisect_left(self._starts, offset)
        if position < len(self._starts) and self._starts[position] == offset + size:
            size += self._remove_free(offset + size)
        if position > 0:
            before = self._starts[position - 1]
            if before + self._free[before] == offset:
                size += self._remove_free(before)
                offset = before
        self._add_free(offset, size)

    def _round_up(self, size: int) -> int:
        if size < 0:
            raise ValueError(f"size {size} is negative")
        return max(1, -(-size // self.alignment)) * self.alignment

    def _take(self, start: int, offset: int, size: int) -> None:
        """Cut ``[offset, offset + size)`` out of the free block at ``start``."""
        end = start + self._remove_free(start)
        if offset > start:
            self._add_free(start, offset - start)
        if end > offset + size:
            self._add_free(offset + size, end - offset - size)
        self._taken[offset] = size
        self.in_use_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.in_use_bytes)

    def _add_free(self, offset: int, size: int) -> None:
        self._free[offset] = size
        insort(self._starts, offset)
        insort(self._by_size, (size, offset))

    def _remove_free(self, offset: int) -> int:
        size = self._free.pop(offset)
        del self._starts[bisect_left(self._starts, offset)]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        return size
