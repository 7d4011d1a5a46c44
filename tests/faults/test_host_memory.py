"""Host memory refused at each size: what must leave the device finds another place, or one clear error."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchlms.errors import HostBudgetTooSmall, SpillError
from torchlms.memory import arena
from torchlms.memory.arena import Arena, pinned_bytes_in_use
from torchlms.memory.store import SLAB_BYTES, Store

MIB = 1 << 20
SIZES = (1, 4096, MIB, 3 * MIB, 64 * MIB)
LIMITS = (0, 4096, 2 * MIB, 16 * MIB, SLAB_BYTES - 1, SLAB_BYTES)


class HostOnly:
    """A device of which the store uses no more than that it has host memory behind it."""

    is_cuda = True
    torch_device = torch.device("cpu")

    def synchronize(self) -> None:
        pass


class Refusing:
    """Registers up to a limit, as a driver does that may lock so much memory and no more."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held: set[int] = set()

    def available(self) -> bool:
        return True

    def register(self, address: int, size_bytes: int) -> int:
        if size_bytes > self.limit_bytes:
            return 2
        self.held.add(address)
        return 0

    def unregister(self, address: int) -> int:
        self.held.remove(address)
        return 0


@pytest.fixture
def store(spill_dir: Path) -> Iterator[Store]:
    made: Any = HostOnly()
    store = Store(made, host_budget_bytes=8 * SLAB_BYTES, disk_budget_bytes=256 * MIB, disk_dir=spill_dir)
    yield store
    store.close()


def map_at_most(limit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mappings above ``limit_bytes`` are refused, as under a limit on the address space."""
    right = arena._map

    def limited(size_bytes: int, **options: Any) -> Any:
        if size_bytes > limit_bytes:
            raise HostBudgetTooSmall("cannot map: on purpose", missing_bytes=size_bytes)
        return right(size_bytes, **options)

    monkeypatch.setattr(arena, "_map", limited)


def mapped(size_bytes: int) -> int:
    """Whole pages of the kind that an arena of this size has."""
    page_bytes = arena.HUGE_PAGE_BYTES if size_bytes >= arena.HUGE_PAGE_BYTES else 4096
    return -(-size_bytes // page_bytes) * page_bytes


@pytest.mark.parametrize("limit_bytes", LIMITS)
@pytest.mark.parametrize("size_bytes", SIZES)
def test_what_no_memory_holds_goes_to_disk(
    size_bytes: int, limit_bytes: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Arena, "touch", lambda self: 0.0)  # a whole slab takes a while
    map_at_most(limit_bytes, monkeypatch)
    place = store.place(size_bytes)
    assert place.tier == ("host" if limit_bytes >= SLAB_BYTES else "disk")
    assert place.size_bytes == size_bytes
    place.free()


@pytest.mark.parametrize("limit_bytes", LIMITS)
@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_plan_is_told_what_it_cannot_have(
    size_bytes: int, limit_bytes: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_at_most(limit_bytes, monkeypatch)
    if mapped(size_bytes) > limit_bytes:
        with pytest.raises(HostBudgetTooSmall, match="on purpose"):
            store.plan_arena(size_bytes)
        assert store.place_planned(0, size_bytes) is None
        assert store.host_bytes() == 0
    else:
        store.plan_arena(size_bytes)
        place = store.place_planned(0, size_bytes)
        assert place is not None
        place.free()


def test_neither_memory_nor_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    map_at_most(0, monkeypatch)
    monkeypatch.setattr("os.posix_fallocate", _full)
    with pytest.raises((HostBudgetTooSmall, SpillError), match="must leave"):
        store.place(64 * MIB)


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "on purpose")


@pytest.mark.parametrize("size_bytes", SIZES)
@pytest.mark.parametrize("limit_bytes", [0, 4096, 2 * MIB, 16 * MIB])
def test_memory_that_cannot_be_registered_is_pageable(
    size_bytes: int, limit_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    registrar = Refusing(limit_bytes)
    with Arena(size_bytes, pinned=True, registrar=registrar) as made:
        assert made.pinned is (made.capacity_bytes <= limit_bytes)
        assert made.pinned or "cudaHostRegister returned error 2" in caplog.text
        offset = made.allocate(size_bytes)
        assert offset is not None
        view = made.view(offset, size_bytes)
        view.fill_(7)
        assert bool((view == 7).all()), "the same memory, pinned or not"
        assert bool(pinned_bytes_in_use()) is made.pinned
    assert registrar.held == set()
    assert pinned_bytes_in_use() == 0
