"""The CPU's budget: the ledger counts what lives, exactly, and the allocator agrees."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from sessions import (
    ledger_of,
    new_session,
    open_lms,
    plain_peak,
    plain_step,
    run_lms,
    smallest_budget,
)
from small_networks import NETWORKS, Network
from torch.profiler import ProfilerActivity, profile

from torchlms.memory.ledger import Ledger

KIB = 1 << 10


def blank(size_bytes: int) -> torch.Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8)


def test_a_storage_counts_once_for_as_long_as_it_lives() -> None:
    ledger, tensor = Ledger(), blank(KIB)
    view = tensor[3:].view(-1)
    for item in (tensor, view, tensor.detach(), tensor):
        ledger.add(item.untyped_storage())
    assert ledger.live_bytes == KIB
    del tensor, item
    assert ledger.live_bytes == KIB, "the view still holds all of it"
    del view
    assert ledger.live_bytes == 0
    assert ledger.peak_bytes == KIB


def test_held_by_autograd_alone_it_still_counts() -> None:
    ledger = Ledger()
    x = torch.ones(256, requires_grad=True)
    y = x.exp()
    ledger.add(y.untyped_storage())
    loss = y.sum()
    del y
    gc.collect()
    assert ledger.live_bytes == KIB
    loss.backward()
    assert ledger.live_bytes == 0


def test_a_storage_that_was_resized_is_counted_anew() -> None:
    ledger, tensor = Ledger(), blank(KIB)
    ledger.add(tensor.untyped_storage())
    for size_bytes in (4 * KIB, KIB // 2, 0):
        tensor.untyped_storage().resize_(size_bytes)
        ledger.add(tensor.untyped_storage())
        assert ledger.live_bytes == size_bytes
    del tensor
    assert ledger.live_bytes == 0
    assert ledger.peak_bytes == 4 * KIB


def test_the_peak_starts_again_from_what_lives() -> None:
    ledger = Ledger()
    kept, passing = blank(KIB), blank(3 * KIB)
    for tensor in (kept, passing):
        ledger.add(tensor.untyped_storage())
    del tensor, passing
    assert ledger.peak_bytes == 4 * KIB
    ledger.reset_peak()
    assert ledger.peak_bytes == KIB


def test_two_ledgers_do_not_mix_up_one_storage() -> None:
    """A second LMS over the same parameters; the first has gone."""
    first, second, tensor = Ledger(), Ledger(), blank(KIB)
    first.add(tensor.untyped_storage())
    second.add(tensor.untyped_storage())
    assert (first.live_bytes, second.live_bytes) == (0, KIB)
    del tensor
    assert (first.live_bytes, second.live_bytes) == (0, 0)


def a_tight_budget(network: Network, spill_dir: Path) -> int:
    return max(int(0.55 * plain_peak(network)), smallest_budget(network, spill_dir))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("unet3d", "transformer") else name
        for name in NETWORKS
    ],
)
def test_nothing_is_counted_for_ever(name: str, spill_dir: Path) -> None:
    """After a step there is what the model, its gradients, the states and the batch hold, to the byte."""
    network = NETWORKS[name]
    session = new_session(network)
    with open_lms(session, a_tight_budget(network, spill_dir), spill_dir) as lms:
        for step in range(5):
            plain_step(session, step)
            session.optimizer.zero_grad()
        tensors = [*session.model.parameters(), *session.model.buffers()]
        for state in session.optimizer.state.values():
            tensors += [item for item in state.values() if item is not None]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        assert ledger_of(lms).live_bytes == sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", ["transformer", "mlp"])
def test_the_allocator_agrees(name: str, spill_dir: Path) -> None:
    """What the allocator hands out, seen by the profiler, stays below the budget: kernel scratch apart."""
    network = NETWORKS[name]

    def allocator_peak(budget: int | None) -> int:
        """Of bytes handed out during a planned step, over what is there before it."""
        session = new_session(network)
        level = peak = 0
        if budget is None:
            for step in range(4):
                plain_step(session, step)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                plain_step(session, 4)
        else:
            with open_lms(session, budget, spill_dir):
                for step in range(4):
                    plain_step(session, step)
                with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                    plain_step(session, 4)
        found = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
        events = [event for event in found if event.name() == "[memory]"]
        assert len(events) > 100
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak

    plain, limit = plain_peak(network), a_tight_budget(network, spill_dir)
    saved = allocator_peak(None) - allocator_peak(limit)
    assert saved > 0.8 * (plain - limit), "the ledger says more than the allocator"


def test_the_whole_run_is_watched_here(spill_dir: Path) -> None:
    """The peak of the recorded step is no less real than those that follow; these tests look at all of it."""
    network = NETWORKS["mlp"]
    watched = run_lms(network, int(0.6 * plain_peak(network)), spill_dir)
    assert watched.peak_bytes >= watched.stats["peak_device_bytes"]
