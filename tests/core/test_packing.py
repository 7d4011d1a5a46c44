"""Packing: nothing shares a byte, and little is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from tapes import resnet, transformer, unet

from torchlms.core.packing import Lifetime, aligned, live_bytes, pack

if TYPE_CHECKING:
    from random import Random

    from torchlms.core.tape import Tape


def _lifetime(numbers: tuple[int, int, int]) -> Lifetime:
    size_bytes, start, length = numbers
    return Lifetime(size_bytes, start, start + length)


lifetimes = st.lists(
    st.tuples(st.integers(1, 5000), st.integers(0, 40), st.integers(0, 30)).map(_lifetime), max_size=25
)


@settings(max_examples=300, deadline=None)
@given(lifetimes, st.sampled_from([1, 512, 4096]))
def test_no_two_share_a_byte(lives: list[Lifetime], align_bytes: int) -> None:
    packing = pack(lives, align_bytes=align_bytes)
    placed = list(zip(lives, packing.offsets_bytes, strict=True))
    for index, (life, offset) in enumerate(placed):
        assert offset >= 0
        assert offset % align_bytes == 0
        assert offset + life.size_bytes <= packing.total_bytes
        for other, other_offset in placed[:index]:
            together = life.start <= other.stop and other.start <= life.stop
            apart = offset + life.size_bytes <= other_offset or other_offset + other.size_bytes <= offset
            assert apart or not together
    assert packing.total_bytes >= live_bytes(lives, align_bytes=align_bytes)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5000), max_size=30), st.data())
def test_nested_lifetimes_lose_nothing(sizes: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(sizes))))
    lives = [Lifetime(size, depth, 1000 - depth) for depth, size in enumerate(sizes)]
    shuffled = [lives[index] for index in order]
    assert pack(shuffled).total_bytes == sum(aligned(size, 512) for size in sizes)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 3)), max_size=30), st.randoms())
def test_nor_do_several_side_by_side(forest: list[tuple[int, int]], random: Random) -> None:
    lives: list[Lifetime] = []
    inside: list[tuple[int, int]] = []  # size and start of those that have not ended
    for moment, (size_bytes, ending) in enumerate(forest):
        for _ in range(min(ending, len(inside))):
            size, start = inside.pop()
            lives.append(Lifetime(size, start, moment - 1))
        inside.append((size_bytes, moment))
    lives += [Lifetime(size, start, len(forest)) for size, start in inside]
    random.shuffle(lives)
    assert pack(lives).total_bytes == live_bytes(lives)


@settings(max_examples=200, deadline=None)
@given(lifetimes)
def test_live_bytes_by_definition(lives: list[Lifetime]) -> None:
    at_once = [
        sum(aligned(life.size_bytes, 512) for life in lives if life.start <= moment <= life.stop)
        for moment in range(80)
    ]
    assert live_bytes(lives) == max(at_once)


def _lives(tape: Tape) -> list[Lifetime]:
    return [
        Lifetime(value.size_bytes, stretch.start, stretch.stop)
        for value in tape.values
        for stretch in value.idle
        if value.movable
    ]


def test_networks_lose_at_most_two_percent() -> None:
    for tape in (resnet(24, laps=2), unet(), transformer(24)):
        lives = _lives(tape)
        assert pack(lives).total_bytes <= 1.02 * live_bytes(lives)


def test_nothing_to_pack() -> None:
    assert pack([]).total_bytes == 0
    assert live_bytes([]) == 0
