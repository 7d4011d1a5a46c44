"""What a plan leaves to the allocator grows with the allocator's pages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.core.tapes import gpu
from torchlms.core.headroom import SMALLEST_PAGE_BYTES, budget_for, headroom_bytes, page_bytes
from torchlms.core.machine import Machine

MIB, GIB = 1 << 20, 1 << 30
SIZES = [1, MIB, GIB, 5 * GIB, 13_934_000_000, 16 * GIB, 40 * GIB, 141 * GIB]


@pytest.mark.parametrize("budget_bytes", SIZES)
@pytest.mark.parametrize("drops", [False, True])
def test_pages_are_whole_and_within_bounds(budget_bytes: int, drops: bool) -> None:
    size_bytes = page_bytes(budget_bytes, drops=drops)
    assert size_bytes % (2 * MIB) == 0  # what a device can map
    assert SMALLEST_PAGE_BYTES <= size_bytes <= 256 * MIB


def test_a_small_budget_has_large_pages_too() -> None:
    """Mapping takes a time per page, however small the device is; but not so large that few are left."""
    assert page_bytes(16 * GIB) == 128 * MIB
    assert page_bytes(int(4.2 * GIB)) == 64 * MIB
    assert page_bytes(2 * GIB) == 32 * MIB


@pytest.mark.parametrize("budget_bytes", SIZES)
def test_pages_are_small_where_every_byte_counts(budget_bytes: int) -> None:
    """Values that can only be moved are slow to do without. As much is left free for twice as many."""
    assert page_bytes(budget_bytes, drops=False) <= page_bytes(budget_bytes)
    assert page_bytes(16 * GIB, drops=False) == 64 * MIB
    assert headroom_bytes(gpu(), 16 * GIB, drops=False) == headroom_bytes(gpu(), 16 * GIB)


def test_some_pages_are_left_free() -> None:
    assert headroom_bytes(gpu(), 16 * GIB) > 2 * page_bytes(16 * GIB)
    assert headroom_bytes(gpu(), GIB) <= GIB // 20  # a small budget has few pages to leave


def test_a_ledger_has_no_holes() -> None:
    assert headroom_bytes(replace(gpu(), link=None), 16 * GIB) == 0


@pytest.mark.parametrize("machine", [gpu(), replace(gpu(), link=None)])
@pytest.mark.parametrize("asked_bytes", [0, 3 * MIB, GIB])
def test_what_is_asked_for_is_left_free(machine: Machine, asked_bytes: int) -> None:
    assert headroom_bytes(machine, 16 * GIB, asked_bytes) == asked_bytes


@pytest.mark.parametrize("peak_bytes", [1, 100 * MIB, 3 * GIB, 15 * GIB, 120 * GIB])
def test_a_budget_for_a_peak_holds_it_and_little_more(peak_bytes: int) -> None:
    budget_bytes = budget_for(gpu(), peak_bytes)
    left_bytes = budget_bytes - headroom_bytes(gpu(), budget_bytes)
    assert peak_bytes <= left_bytes <= peak_bytes + 4 * MIB + peak_bytes // 1000
