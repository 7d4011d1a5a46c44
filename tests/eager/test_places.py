"""The store on a CPU: places in the spill file, copies in both directions, and ends in any order."""

from __future__ import annotations

import concurrent.futures.thread
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eviction import leaves, open_wide

from torchlms.errors import HostBudgetTooSmall, SpillError
from torchlms.memory.device import CpuDevice
from torchlms.memory.ledger import Ledger
from torchlms.memory.store import Place, Store

SIZE = 10_000  # no multiple of anything
WAIT_S = 10


@pytest.fixture
def store(spill_dir: Path) -> Iterator[Store]:
    made = Store(CpuDevice(Ledger()), host_budget_bytes=0, disk_budget_bytes=1 << 20, disk_dir=spill_dir)
    assert list(spill_dir.iterdir()) == [], "nothing is made before it is needed"
    made.place(1).free()
    yield made
    made.close()
    assert list(spill_dir.iterdir()) == []


def pattern(seed: int, size_bytes: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, generator=generator)


def blank(size_bytes: int = SIZE) -> torch.Tensor:
    return torch.zeros(size_bytes, dtype=torch.uint8)


def slowly(call: str, started: threading.Event, go_on: threading.Event, patched: Any) -> None:
    """Have ``os.pwrite`` or ``os.preadv`` wait until it is told to go on."""
    real = getattr(os, call)

    def wait(*arguments: Any) -> int:
        started.set()
        assert go_on.wait(WAIT_S)
        return int(real(*arguments))

    patched.setattr(os, call, wait)


def test_many_out_and_back_in_any_order(store: Store) -> None:
    values = [pattern(seed, 1 + 997 * seed) for seed in range(20)]
    places = [store.place(value.numel()) for value in values]
    out = [store.copy_out(value, place) for value, place in zip(values, places, strict=True)]
    targets = [blank(value.numel()) for value in values]
    back = [store.copy_in(places[seed], targets[seed], out[seed]) for seed in reversed(range(20))]
    for copy in back:
        copy.wait()
        assert copy.done()
    assert all(torch.equal(value, target) for value, target in zip(values, targets, strict=True))
    assert store.bytes_out == store.bytes_in == store.disk_bytes == sum(value.numel() for value in values)


def test_a_copy_back_waits_for_the_copy_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    with monkeypatch.context() as patched:
        slowly("pwrite", started, go_on, patched)
        value, target, place = pattern(1), blank(), store.place(SIZE)
        out = store.copy_out(value, place)
        back = store.copy_in(place, target, out)
        assert started.wait(WAIT_S)
        assert not out.done()
        assert not back.done()
        go_on.set()
        back.wait()
    assert torch.equal(target, value)


def test_a_place_is_nobodys_while_it_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    with monkeypatch.context() as patched:
        slowly("pwrite", started, go_on, patched)
        place = store.place(SIZE)
        out = store.copy_out(pattern(1), place)
        assert started.wait(WAIT_S)
        place.free()
        other = store.place(SIZE)
        assert other.offset_bytes != place.offset_bytes
        go_on.set()
        out.wait()
    deadline = time.monotonic() + WAIT_S
    while store.spill is not None and store.spill.in_use_bytes > SIZE + 4096 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.place(SIZE).offset_bytes == place.offset_bytes, "given back when the write had ended"


def test_a_place_is_freed_once() -> None:
    freed: list[int] = []
    place = Place("disk", 0, SIZE, None, lambda: freed.append(1))
    place.free()
    place.free()
    assert freed == [1]


def test_bytes_that_came_back_are_held_by_nobody_here(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that lingers after its work must not keep the memory, which the ledger would count."""
    real = concurrent.futures.thread._WorkItem.run  # type: ignore[attr-defined]

    def lingering(self: Any) -> None:
        real(self)
        time.sleep(0.3)

    place = store.place(SIZE)
    out = store.copy_out(pattern(1), place)
    out.wait()
    monkeypatch.setattr(concurrent.futures.thread._WorkItem, "run", lingering)  # type: ignore[attr-defined]
    target = blank()
    watched = weakref.ref(target)
    store.copy_in(place, target, out).wait()
    del target
    assert watched() is None
    source = pattern(2)
    watched = weakref.ref(source)
    store.copy_out(source, place).wait()
    del source
    assert watched() is None


def test_a_full_disk_says_how_much_is_missing(store: Store) -> None:
    store.place(1 << 19)
    with pytest.raises(HostBudgetTooSmall, match=r"1\.0 MiB more must leave cpu, but disk") as raised:
        store.place(1 << 20)
    assert raised.value.missing_bytes == 1 << 19, "half of it would fit"
    assert "host memory" not in str(raised.value)


def test_what_ended_is_not_opened_again(store: Store, spill_dir: Path) -> None:
    place, value = store.place(SIZE), pattern(1)
    out = store.copy_out(value, place)
    store.close()
    store.close()
    out.wait()
    for use in (
        lambda: store.place(SIZE),
        lambda: store.copy_out(value, place),
        lambda: store.copy_in(place, blank(), out),
    ):
        with pytest.raises(SpillError, match="ended"):
            use()
    place.free()
    assert list(spill_dir.iterdir()) == []


def test_the_cpu_has_no_host_tier(store: Store) -> None:
    store.plan_arena(1 << 20)
    assert (store.peak_host_bytes, store.planned_bytes(), store.host_bytes()) == (0, 0, 0)


def test_the_collector_may_run_in_a_worker(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of writing that very value. A finalizer that waited for the write would wait for ever."""
    started, go_on, collected = threading.Event(), threading.Event(), threading.Event()
    real = os.pwrite

    def collecting(*arguments: Any) -> int:
        if not started.is_set():
            started.set()
            assert go_on.wait(WAIT_S)
            gc.collect()
            collected.set()
        return real(*arguments)

    class Node:
        """Holds a graph, and itself."""

    gc.disable()
    try:
        with open_wide(spill_dir) as lms:
            assert lms._engine is not None
            node: Any = Node()
            node.itself = node
            x, w = leaves()
            node.loss = (x @ w).tanh().exp().sum()
            slot = next(slot for slot in lms._engine.living() if slot.alone())
            watched = weakref.ref(slot)
            place = lms._engine.store.place(slot.size_bytes)
            monkeypatch.setattr(os, "pwrite", collecting)
            slot.send(place)
            assert started.wait(WAIT_S)
            del slot, node
            go_on.set()
            assert collected.wait(WAIT_S), "the worker waits for itself"
            assert watched() is None
            torch.ones(1)  # the next op lets go of what was left
            assert not lms._engine.orphans
            assert lms._engine.store.spill is not None
            assert lms._engine.store.spill.in_use_bytes == 0
    finally:
        gc.enable()
