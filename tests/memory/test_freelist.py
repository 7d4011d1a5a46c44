"""FreeList: no overlaps, nothing lost, whatever the order."""

from __future__ import annotations

import gc
import itertools
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlms.memory.freelist import FreeList

STEPS = st.lists(
    st.tuples(st.sampled_from(["allocate", "reserve", "free"]), st.integers(0, 900)), max_size=80
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, alignment=st.sampled_from([1, 8, 64]))
def test_blocks_never_overlap_and_everything_comes_back(steps, alignment):
    blocks, taken = FreeList(2000, alignment), {}
    for verb, number in steps:
        if verb == "free" and taken:
            offset = sorted(taken)[number % len(taken)]
            blocks.free(offset)
            del taken[offset]
        elif verb == "reserve":
            offset = number // alignment * alignment
            end = offset + blocks_size(number % 97, alignment)
            fits = end <= blocks.capacity_bytes and all(end <= o or offset >= o + s for o, s in taken.items())
            assert blocks.reserve(offset, number % 97) == fits
            if fits:
                taken[offset] = end - offset
        elif verb == "allocate":
            largest = blocks.largest_free_bytes
            offset = blocks.allocate(number)
            assert (offset is not None) == (blocks_size(number, alignment) <= largest)
            if offset is not None:
                assert offset % alignment == 0
                taken[offset] = blocks_size(number, alignment)
        spans = sorted((o, o + s) for o, s in taken.items())
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
        assert not spans or spans[-1][1] <= blocks.capacity_bytes
        assert blocks.in_use_bytes == sum(taken.values()) <= blocks.peak_bytes
        assert len(blocks) == len(taken)
    for offset in taken:
        blocks.free(offset)
    assert blocks.in_use_bytes == 0
    assert blocks.largest_free_bytes == blocks.capacity_bytes  # all merged


def blocks_size(size, alignment):
    return max(1, -(-size // alignment)) * alignment


def test_the_smallest_gap_that_fits_is_taken():
    blocks = FreeList(100, 1)
    offsets = [blocks.allocate(size) for size in (30, 5, 10, 5, 50)]
    assert offsets == [0, 30, 35, 45, 50]
    blocks.free(0)
    blocks.free(35)
    assert blocks.allocate(8) == 35
    assert blocks.allocate(31) is None


def test_misuse_is_refused():
    blocks = FreeList(100, 10)
    offset = blocks.allocate(10)
    blocks.free(offset)
    with pytest.raises(KeyError):
        blocks.free(offset)
    with pytest.raises(ValueError, match="negative"):
        blocks.allocate(-1)
    with pytest.raises(ValueError, match="multiple"):
        blocks.reserve(5, 10)
    with pytest.raises(ValueError, match="alignment"):
        FreeList(10, 0)
    assert FreeList(0, 10).allocate(1) is None


def test_threads_share_it():
    blocks = FreeList(1 << 20, 64)

    def work(seed):
        draw, mine = random.Random(seed), []
        for _ in range(2000):
            if mine and draw.random() < 0.5:
                blocks.free(mine.pop(draw.randrange(len(mine))))
            elif (offset := blocks.allocate(draw.randrange(1, 4000))) is not None:
                mine.append(offset)
        for offset in mine:
            blocks.free(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert blocks.in_use_bytes == 0
    assert blocks.largest_free_bytes == 1 << 20


def test_free_from_a_finalizer_while_the_lock_is_held():
    class Holder:
        def __init__(self):
            self.offset, self.itself = blocks.allocate(10), self

        def __del__(self):
            blocks.free(self.offset)

    blocks = FreeList(100, 10)
    Holder()
    with blocks._lock:  # as the collector would find it in the middle of allocate
        gc.collect()
    assert blocks.allocate(100) == 0
