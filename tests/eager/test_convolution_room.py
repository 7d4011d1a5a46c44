"""What is reserved for a convolution's backward pass is enough, wherever the allocator finds the room."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pages import MIB, Pages, Piece

from torchlms.eager import convolution
from torchlms.eager import ladder as ladder_module
from torchlms.eager.convolution import ConvolutionRoom
from torchlms.eager.ladder import Ladder

BACKWARD = torch.ops.aten.convolution_backward.default


def take(pages: Pages, size: int) -> Piece | None:
    """``size`` MiB, or None where the cap has no room for that."""
    return pages.try_take(size * MIB)


def crowded(pages: Pages, draw: random.Random) -> list[Piece]:
    """Values that came and went, until there is no room; with a remap now and then."""
    living: list[Piece] = []
    while (piece := take(pages, draw.choice([216, 216, 108, 54, 32, 10, 433]))) is not None:
        living.append(piece)
        if draw.random() < 0.3:
            living.pop(draw.randrange(len(living)))
        if draw.random() < 0.1:
            pages.unmap()
    return living


def ladder_on(pages: Pages, living: list[Piece], draw: random.Random) -> Ladder:
    """A ladder for which ``pages`` are all there is, and that has ``living`` to evict."""

    def reclaim(want_bytes: int, operands: Any = None) -> int:
        return living.pop(draw.randrange(len(living))).nbytes if living else 0

    device = SimpleNamespace(torch_device=torch.device("cuda", 0), held_bytes=pages.unmap)
    ladder = Ladder(device, None, SimpleNamespace(), None, 0)  # type: ignore[arg-type]
    ladder.reclaim = reclaim  # type: ignore[method-assign]
    return ladder


@pytest.fixture
def pages_under(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pages], None]:
    """Has the ladder allocate on such pages."""

    def under(pages: Pages) -> None:
        def unwritten(size_bytes: int, device: torch.device) -> Piece:
            piece = pages.try_take(size_bytes)
            if piece is None:
                raise torch.OutOfMemoryError("no room")
            return piece

        monkeypatch.setattr(ladder_module, "unwritten", unwritten)

    return under


def found_room(seed: int, pages_under: Callable[[Pages], None]) -> bool | None:
    """Whether both gradients and their workspaces, one after the other, found the room that was reserved;
    None if it never was."""
    draw = random.Random(seed)
    pages = Pages(draw.randint(1500, 3100), page=draw.choice([20, 48]))
    living = crowded(pages, draw)
    inputs, weights = draw.choice([216, 108]), draw.choice([2, 9, 36])
    first, second = draw.choice([216, 300, 433]), draw.choice([60, 216])
    rooms = ConvolutionRoom(SimpleNamespace(of=lambda *_: (inputs, weights)))  # type: ignore[arg-type]
    scratch = max(inputs + first, inputs + weights + second) - inputs - weights
    rooms.learn(BACKWARD, (seed,), {}, scratch)
    blocks, _ = rooms.need(BACKWARD, (seed,), {})
    pages_under(pages)
    if not ladder_on(pages, living, draw).reserve(tuple(block * MIB for block in blocks)):
        return None
    there = [take(pages, inputs), take(pages, first)]
    fits = None not in there
    del there[-1]
    there += [take(pages, weights), take(pages, second)]
    return fits and None not in there


# Those in which the room was there when it was reserved and not when it was used, if asked for once only.
TIGHT = [5795, 7723, 10032]


def test_both_gradients_find_the_room_that_was_reserved(
    pages_under: Callable[[Pages], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "_KNOWN_BLOCKS", {})
    found = [found_room(seed, pages_under) for seed in (*TIGHT, *range(60))]
    assert found.count(True) > 30
    assert False not in found


def test_the_first_workspace_may_be_as_large_as_it_and_the_second_gradient() -> None:
    rooms = ConvolutionRoom(SimpleNamespace(of=lambda *_: (216, 9)))  # type: ignore[arg-type]
    rooms.learn(BACKWARD, ("of this test",), {}, 424)
    assert rooms.need(BACKWARD, ("of this test",), {}) == ((216, 9, 433), True)


def shifting() -> tuple[Pages, list[Piece]]:
    """As it was on an H100, where a convolution starved that had had its room a moment before: the hole in
    the middle takes a result and all but a little of the workspace. To map that in one piece takes all pages
    that are free, and makes a hole which the result then fits better."""
    pages = Pages(3020, page=48)
    pages.mapped.update(range(9, 71))
    starts = {442: 32, 474: 32, 506: 10, 516: 216} | {1380 + 216 * number: 216 for number in range(9)}
    pages.used.update(starts)
    return pages, [Piece(pages.used, start) for start in starts]


def test_room_that_shifts_when_it_is_used_is_no_room(pages_under: Callable[[Pages], None]) -> None:
    blocks = (216 * MIB, 433 * MIB)
    pages, living = shifting()
    assert None not in [pages.try_take(block) for block in blocks]
    assert None in [pages.try_take(block) for block in blocks]
    pages, living = shifting()
    pages_under(pages)
    before = len(living)
    assert ladder_on(pages, living, random.Random(0)).reserve(blocks)
    assert len(living) < before
    remaps = pages.remaps
    assert None not in [pages.try_take(block) for block in blocks]
    assert pages.remaps == remaps


def test_room_may_shift_more_than_once(pages_under: Callable[[Pages], None]) -> None:
    """The blocks find places, then others, and then none: to have found room twice is not enough."""
    blocks = (54 * MIB, 216 * MIB, 60 * MIB)

    def shifting_twice() -> tuple[Pages, list[Piece]]:
        pages = Pages(1899)
        pages.mapped.update(set(range(97)) - {36, 37, 38, 47, 48, 49})
        used = {0: 10, 10: 216, 258: 10, 268: 433, 780: 10, 790: 32, 822: 108, 1000: 10, 1016: 433, 1449: 216}
        pages.used.update(used)
        return pages, [Piece(pages.used, start) for start in used]

    pages, living = shifting_twice()
    found = [None not in [pages.try_take(block) for block in blocks] for _ in range(3)]
    assert found == [True, True, False]
    pages, living = shifting_twice()
    pages_under(pages)
    assert ladder_on(pages, living, random.Random(0)).reserve(blocks)
    remaps = pages.remaps
    assert None not in [pages.try_take(block) for block in blocks]
    assert pages.remaps == remaps


def test_before_it_gives_way_all_free_memory_is_put_in_order(pages_under: Callable[[Pages], None]) -> None:
    draw = random.Random(463)
    pages = Pages(draw.randint(1500, 3100), page=draw.choice([20, 48]))
    living = crowded(pages, draw)
    for _ in range(draw.randint(1, 4)):
        living.pop(draw.randrange(len(living)))
    blocks = (216 * MIB, 433 * MIB)
    assert None in [pages.try_take(block) for block in blocks]
    pages_under(pages)
    assert ladder_on(pages, [], draw).reserve(blocks)


def test_garbage_is_looked_for_before_a_refusal_alone(
    pages_under: Callable[[Pages], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages(500)
    garbage = [pages.try_take(400 * MIB)]
    pages_under(pages)
    ladder = ladder_on(pages, [], random.Random(0))

    def collect(*_: object, **__: object) -> tuple[int, int, None]:
        found = len(garbage)
        garbage.clear()
        return found, 0, None

    monkeypatch.setattr(ladder, "_send_what_garbage_held", collect)
    assert not ladder.reserve((216 * MIB,))
    assert ladder.reserve((216 * MIB,), refusing=True)
