"""Compaction: the window found is one, is the cheapest, and what stands in it fits elsewhere."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from torchlms.memory.compaction import Block, Window, find_window, first_misfit


def run_of(text: str, address: int = 0) -> list[Block]:
    """``.3 m2 x1``: three free, two movable, one fixed."""
    blocks = []
    for word in text.split():
        size = int(word[1:])
        blocks.append(Block(address, size, word[0] == ".", word[0] == "m"))
        address += size
    return blocks


runs_of_blocks = st.lists(
    st.lists(st.tuples(st.sampled_from(".mx"), st.integers(1, 6)), min_size=1, max_size=6),
    min_size=1,
    max_size=3,
)


def laid_out(words: list[list[tuple[str, int]]]) -> list[list[Block]]:
    """Runs far from each other."""
    return [
        run_of(" ".join(f"{kind}{size}" for kind, size in run), 1000 * index)
        for index, run in enumerate(words)
    ]


def placed(sizes: list[int], holes: list[int]) -> bool:
    """Whether ``sizes``, in this order, each go to the smallest hole that takes them."""
    holes = sorted(holes)
    for size in sizes:
        fitting = [hole for hole in holes if hole >= size]
        if not fitting:
            return False
        holes.remove(fitting[0])
        holes = sorted([*holes, fitting[0] - size])
    return True


def cheapest(runs: list[list[Block]], size: int) -> int | None:
    """Brute force: fewest bytes to move over every span of whole blocks."""
    costs = []
    for run in runs:
        for first in range(len(run)):
            for last in range(first, len(run)):
                span = run[first : last + 1]
                if sum(block.size_bytes for block in span) < size:
                    continue
                if any(not block.free and not block.movable for block in span):
                    continue
                moved = sorted((block.size_bytes for block in span if not block.free), reverse=True)
                holes = [
                    block.size_bytes for other in runs for block in other if block.free and block not in span
                ]
                if placed(moved, holes):
                    costs.append(sum(moved))
    return min(costs, default=None)


@settings(max_examples=400, deadline=None)
@given(runs_of_blocks, st.integers(1, 15))
def test_against_brute_force(words: list[list[tuple[str, int]]], size: int) -> None:
    runs = laid_out(words)
    window = find_window(runs, size)
    best = cheapest(runs, size)
    assert (window is None) == (best is None)
    if window is None:
        return
    assert window.moved_bytes == best
    assert window.stop - window.start >= size
    inside = [block for run in runs for block in run if window.contains(block.address)]
    assert sum(block.size_bytes for block in inside) == window.stop - window.start
    assert {block.address for block in window.moves} == {block.address for block in inside if not block.free}


def test_a_hole_that_is_there_needs_no_moves() -> None:
    assert find_window([run_of("m4 .5 x1")], 5) == Window(4, 9, ())


def test_the_largest_is_moved_first() -> None:
    window = find_window([run_of("x1 .2 m1 .1 m3 .1 x1 .3 x1 .1")], 8)
    assert window is not None
    assert [block.size_bytes for block in window.moves] == [3, 1]


def test_nothing_is_moved_that_finds_no_other_place() -> None:
    assert find_window([run_of(".4 m5 .4 x1 .3")], 8) is None


def test_a_hole_that_could_grow_is_spared_and_the_next_block_finds_none() -> None:
    """A block of 216 does not go to 230 with 380 unmapped behind it, but to 442 with nothing behind it."""
    growing, fixed = Block(0, 230, True, spare_bytes=380), Block(1000, 442, True)
    assert first_misfit([[growing], [fixed]], [216, 433]) == 1
    assert first_misfit([[Block(0, 230, True)], [fixed]], [216, 433]) is None


def test_a_hole_is_spared_only_for_one_that_reaches_less_far() -> None:
    growing, larger = Block(0, 230, True, spare_bytes=100), Block(1000, 442, True)
    assert first_misfit([[growing], [larger]], [216, 433]) is None


def test_holes_are_spared_one_after_the_other_until_one_reaches_further_than_the_next() -> None:
    holes = [Block(0, 10, True, spare_bytes=90), Block(200, 20, True, spare_bytes=60), Block(400, 30, True)]
    assert first_misfit([holes], [10, 30]) == 1
    assert first_misfit([[*holes[:2], Block(400, 30, True, spare_bytes=60)]], [10, 30]) is None


def test_what_is_left_of_a_hole_could_still_grow() -> None:
    growing, fixed = Block(0, 300, True, spare_bytes=300), Block(1000, 250, True)
    assert first_misfit([[growing], [fixed]], [260, 30, 250]) == 2
