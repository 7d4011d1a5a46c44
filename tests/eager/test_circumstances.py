"""Switches of torch that are on, sizes at the edges, and LMS entered or left in the middle of things."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from eviction import evict, gradients, leaves, open_wide
from sessions import (
    assert_same_bits,
    bits,
    ledger_of,
    moved_bytes,
    new_session,
    open_lms,
    outcome,
    plain_peak,
    plain_step,
    run_plain,
)
from small_networks import NETWORKS
from torch import Tensor

import torchlms
from torchlms.eager.slot import Where
from torchlms.eager.tensors import hollow, new_bytes
from torchlms.memory.disk import CHUNK_BYTES
from torchlms.memory.open_file import ALIGNMENT_BYTES

MLP = NETWORKS["mlp"]
BUDGET = 900_000  # of 1.7 MB


def hidden(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w).exp()


def test_entered_in_the_middle_of_training_and_left_again(spill_dir: Path) -> None:
    """Gradients and optimizer states are there already, and count."""
    session = new_session(MLP)
    plain_step(session, 0)
    plain_step(session, 1)
    states = sum(item.nbytes for state in session.optimizer.state.values() for item in state.values())
    with open_lms(session, BUDGET, spill_dir) as lms:
        parameters = sum(parameter.nbytes for parameter in session.model.parameters())
        assert ledger_of(lms).live_bytes == 2 * parameters + states
        for step in range(2, 7):
            plain_step(session, step)
        assert lms.stats()["bytes_out_per_step"] > 0
        assert ledger_of(lms).highest() <= BUDGET
        predicted = lms.stats()["predicted"]["peak_device_bytes"]
        assert abs(predicted - lms.stats()["peak_device_bytes"]) <= 0.05 * predicted
    plain_step(session, 7)
    assert outcome(session).differences(run_plain(MLP, plain_step, 8)) == []


def test_one_lms_after_another_with_other_budgets(spill_dir: Path) -> None:
    plain_bytes = plain_peak(MLP)
    session = new_session(MLP)
    for turn, budget in enumerate((BUDGET, 3_000_000, 700_000)):
        with open_lms(session, budget, spill_dir) as lms:
            for step in range(4):
                plain_step(session, 4 * turn + step)
            assert ledger_of(lms).highest() <= budget
            assert (moved_bytes(lms) > 0) is (budget < plain_bytes)
    assert outcome(session).differences(run_plain(MLP, plain_step, 12)) == []


@pytest.mark.parametrize("name", ["resnet", "transformer", "lstm"])
def test_no_warnings(name: str, spill_dir: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(NETWORKS[name], plain_step, spill_dir, share=0.85)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "switch",
    [
        deterministic,
        default_dtype,
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autograd.set_multithreading_enabled(False),
    ],
    ids=["deterministic", "dtype", "inference", "no_grad", "default_device", "threads"],
)
def test_values_come_and_go_under_any_switch(switch: Any, spill_dir: Path) -> None:
    """They leave while it is on, and come back under it or after it."""
    plain, _ = gradients(hidden)

    def saved_and_back(inside: AbstractContextManager[Any]) -> tuple[list[str], int]:
        with open_wide(spill_dir) as lms:
            assert lms._engine is not None
            x, w = leaves()
            out = hidden(x, w)
            with inside:
                away = evict(lms)
                slots = [slot for slot in lms._engine.living() if slot.where is Where.AWAY]
                for slot in slots[::2]:
                    slot.fetch()
            found = torch.autograd.grad(out.sum(), (x, w))
            return [bits(item) for item in found], away

    found, away = saved_and_back(switch())
    assert found == plain[1:]
    assert away > 0


def test_memory_to_come_back_to_is_no_inference_tensor() -> None:
    """Such a one cannot be written once inference mode has ended."""
    with torch.inference_mode():
        found = [new_bytes(64, torch.device("cpu")), hollow(torch.float32, torch.device("cpu"))]
    assert not any(tensor.is_inference() for tensor in found)
    assert [tensor.requires_grad for tensor in found] == [False, False]
    found[0].fill_(1)


EDGES = [512, ALIGNMENT_BYTES, ALIGNMENT_BYTES + 4, CHUNK_BYTES - 4, CHUNK_BYTES, 2 * CHUNK_BYTES + 4092]


@pytest.mark.parametrize("size_bytes", EDGES)
def test_values_of_any_size(size_bytes: int, spill_dir: Path) -> None:
    """At the edges of what the disk takes at once."""

    def through(lms: torchlms.LMS | None) -> str:
        torch.manual_seed(7)
        x = torch.randn(size_bytes // 4).requires_grad_()
        loss = x.sin().exp().sum()  # saves x, which we hold, and the result of exp
        if lms is not None:
            assert evict(lms) == 1
            assert moved_bytes(lms) == size_bytes
        loss.backward()
        assert x.grad is not None
        return bits(x.grad)

    plain = through(None)
    with torchlms.LMS(device="cpu", budget="1GiB", disk_dir=spill_dir) as lms:
        assert through(lms) == plain


def test_values_below_the_least_size_stay(spill_dir: Path) -> None:
    with open_wide(spill_dir) as lms:
        x = torch.randn(127).requires_grad_()
        loss = x.sin().exp().sum()
        assert evict(lms) == 0
        loss.backward()
        assert x.grad is not None


def test_errors_of_torch_are_its_own(spill_dir: Path) -> None:
    x, w = leaves()
    calls = [
        lambda: x @ w[:3],
        lambda: x.view(7, 7),
        lambda: torch.cat([x, x[0]]),
        lambda: x.sum().backward(torch.ones(3)),
        lambda: torch.linalg.cholesky(-torch.eye(4)),
        lambda: x.long() @ w,
    ]

    def complaints() -> list[str]:
        found = []
        for call in calls:
            with pytest.raises(RuntimeError) as raised:
                call()
            found.append(f"{type(raised.value).__name__}: {raised.value}")
        return found

    plain = complaints()
    with open_wide(spill_dir) as lms:
        assert complaints() == plain
        assert gradients(hidden, lms)[1] > 0


def test_freed_graphs_are_told_apart_from_moved_ones(spill_dir: Path) -> None:
    """A second backward pass over a freed graph is an error, here as everywhere."""
    with open_wide(spill_dir):
        x, w = leaves()
        loss = hidden(x, w).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
