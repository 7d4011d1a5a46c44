"""Trouble on a device: memory that runs out in an op, less of it while training runs, bytes that change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch._ops import OpOverload

import torchlms
from tests.gpu.networks import CASES, GIB, MIB, Case, clean, make, plain, same, state, train
from torchlms.eager import private
from torchlms.eager.ladder import Ladder
from torchlms.eager.verifier import Sums
from torchlms.memory import arena
from torchlms.memory.store import Store

pytestmark = pytest.mark.gpu
CASE = CASES["convnet"]
MOVES = {"recompute": False}


class Calls:
    """Counts the ops that a mode runs; the one with the number ``struck`` fails as if memory were short."""

    def __init__(self, struck: int = -1) -> None:
        self.struck, self.seen = struck, 0

    @contextmanager
    def counted(self) -> Iterator[Calls]:
        right = OpOverload.__call__

        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            if self.seen - 1 == self.struck:
                raise torch.OutOfMemoryError("on purpose. Tried to allocate 2.00 MiB")
            return right(*args, **kwargs)

        with patch.object(OpOverload, "__call__", call):
            yield self


def in_parts(parts: list[int]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Losses of so many steps at a time, each part from the same seed, and the state at the end."""
    model, optimizer = make(CASE)
    losses = [loss for part in parts for loss in train(model, optimizer, CASE, part)]
    end = state(model)
    del model, optimizer
    clean()
    return losses, end


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
def test_memory_that_runs_out_in_an_op_of_a_planned_step(share: float) -> None:
    losses, end = in_parts([6, 1, 1, 2])
    model, optimizer = make(CASE)
    with torchlms.LMS(model, optimizer, budget=CASE.budget_bytes, rules=MOVES) as lms:
        ours = train(model, optimizer, CASE, 6)
        with Calls().counted() as calls:
            ours += train(model, optimizer, CASE, 1)
        with Calls(int(share * calls.seen)).counted() as struck:
            ours += train(model, optimizer, CASE, 1)
        assert struck.seen > struck.struck
        ours += train(model, optimizer, CASE, 2)
        stats = lms.stats()
    assert ours == losses
    assert same(end, state(model))
    assert stats["retries"] >= 1
    assert stats["starved_convolutions"] == 0


def test_the_budget_changes_while_training_runs() -> None:
    losses, end = in_parts([6, 6, 6])
    model, optimizer = make(CASE)
    tight = int(0.8 * CASE.budget_bytes)
    with torchlms.LMS(model, optimizer, budget=CASE.budget_bytes, rules=MOVES) as lms:
        ours = train(model, optimizer, CASE, 6)
        for budget_bytes in (tight, CASE.budget_bytes):
            lms.set_budget(budget_bytes)
            torch.cuda.reset_peak_memory_stats()
            ours += train(model, optimizer, CASE, 6)
            assert torch.cuda.max_memory_reserved() <= budget_bytes
            assert lms.stats()["budget_bytes"] == budget_bytes
        assert lms.stats()["record_steps"] == 1, "nothing is recorded again"
    assert ours == losses
    assert same(end, state(model))


def test_less_in_the_middle_of_a_step() -> None:
    losses, end = in_parts([6])
    model, optimizer = make(CASE)
    tight = int(0.8 * CASE.budget_bytes)
    seen = 0
    with torchlms.LMS(model, optimizer, budget=CASE.budget_bytes, rules=MOVES) as lms:

        def lower(*_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == 5:
                lms.set_budget(tight)
                torch.cuda.reset_peak_memory_stats()

        handle = model.register_forward_hook(lower)  # between forward and backward
        assert train(model, optimizer, CASE, 6) == losses
        handle.remove()
        assert torch.cuda.max_memory_reserved() <= tight
    assert same(end, state(model))


def test_everything_leaves_at_once_and_comes_back() -> None:
    torch.manual_seed(5)
    x, y = torch.randn(*CASE.shape, device="cuda"), torch.zeros(CASE.shape[0]).long().cuda()

    def gradients(reclaim: Callable[[], int] | None, model: torch.nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(6)
        loss = F.cross_entropy(model(x), y)
        if reclaim is not None:
            before = torch.cuda.memory_allocated()
            freed_bytes = reclaim()
            assert freed_bytes > 100 * MIB
            assert torch.cuda.memory_allocated() <= before - freed_bytes + MIB
        loss.backward()
        found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return found

    model, _ = make(CASE)
    expected = gradients(None, model)
    model, optimizer = make(CASE)
    with torchlms.LMS(model, optimizer, budget=CASE.budget_bytes, rules=MOVES) as lms:
        for _ in range(3):  # batch normalisation's statistics do not reach gradients in training
            found = gradients(lms.reclaim, model)
            assert all(torch.equal(left, right) for left, right in zip(expected, found, strict=True))


def test_every_value_that_comes_back_is_checked() -> None:
    losses, end = plain(CASE, 6)
    model, optimizer = make(CASE)
    with torchlms.LMS(model, optimizer, budget=CASE.budget_bytes, rules=MOVES, verify=True) as lms:
        assert train(model, optimizer, CASE, 6) == losses
        assert lms.stats()["verified_values"] > 0
    assert same(end, state(model))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_checks_while_memory_is_short(case: Case) -> None:
    """Without a plan values leave when an allocation has failed: there is no room for anything then."""
    losses, end = plain(case, 3)
    model, optimizer = make(case)
    options: dict[str, Any] = {"rules": MOVES, "plan": False, "verify": True}
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes, **options) as lms:
        assert train(model, optimizer, case, 3) == losses
        stats = lms.stats()
    assert same(end, state(model))
    assert stats["verified_values"] > 0
    assert stats["starved_convolutions"] == 0


def test_a_sum_on_a_full_device() -> None:
    data = torch.randint(0, 256, (3 * MIB + 5,), dtype=torch.uint8)
    there, sums = data.cuda(), Sums(torch.device("cuda", torch.cuda.current_device()))
    clean()
    fraction = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction(64 * MIB / torch.cuda.get_device_properties(0).total_memory)
    filling, size_bytes = [], 16 * MIB
    try:
        while size_bytes >= 512:
            try:
                filling.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size_bytes //= 2
        assert sums.checksum(there) == Sums(torch.device("cpu")).checksum(data)
        assert Sums(torch.device("cpu")).checksum(there) == Sums(torch.device("cpu")).checksum(data)
    finally:
        torch.cuda.set_per_process_memory_fraction(fraction)


def test_a_byte_that_changes_on_the_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Store._host_to_device

    def wrong(self: Store, source: torch.Tensor, target: torch.Tensor, *arguments: Any) -> Any:
        torch.cuda.synchronize()
        source[0] ^= 1  # where it waits, in host memory
        return right(self, source, target, *arguments)

    monkeypatch.setattr(Store, "_host_to_device", wrong)
    model, optimizer = make(CASE)
    with (
        pytest.raises(torchlms.VerifyFailed, match="left for the host"),
        torchlms.LMS(model, optimizer, budget=CASE.budget_bytes, rules=MOVES, verify=True),
    ):
        train(model, optimizer, CASE, 6)


@pytest.mark.parametrize(
    ("what", "limit_bytes"), [("mapping", 256 * MIB), ("mapping", 1536 * MIB), ("registering", 0)]
)
def test_host_memory_refused_above_a_size(
    what: str, limit_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of what was planned, or even of a slab. What goes to disk still passes through a little of it."""
    losses, end = plain(CASE, 8)
    refuse_above(limit_bytes, what, monkeypatch)
    model, optimizer = make(CASE)
    with torchlms.LMS(
        model, optimizer, budget=CASE.budget_bytes, rules=MOVES, disk_dir=tmp_path, disk_budget=16 * GIB
    ) as lms:
        assert train(model, optimizer, CASE, 8) == losses
        stats = lms.stats()
    assert same(end, state(model))
    assert stats["bytes_out_per_step"] > 0


def test_no_host_memory_at_all_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse_above(0, "mapping", monkeypatch)
    model, optimizer = make(CASE)
    with (
        pytest.raises(torchlms.LMSError),
        torchlms.LMS(model, optimizer, budget=CASE.budget_bytes, rules=MOVES, disk_dir=tmp_path),
    ):
        train(model, optimizer, CASE, 4)
    model.zero_grad()
    train(model, optimizer, CASE, 1)  # the cap is lifted


def refuse_above(limit_bytes: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped, register = arena._map, arena.CudaRegistrar.register

    def map_some(size_bytes: int, **options: Any) -> Any:
        if size_bytes > limit_bytes:
            raise torchlms.HostBudgetTooSmall("cannot map: on purpose", missing_bytes=size_bytes)
        return mapped(size_bytes, **options)

    def register_some(self: Any, address: int, size_bytes: int) -> int:
        return 2 if size_bytes > limit_bytes else register(self, address, size_bytes)

    if what == "mapping":
        monkeypatch.setattr(arena, "_map", map_some)
    else:
        monkeypatch.setattr(arena.CudaRegistrar, "register", register_some)


def test_a_convolution_refused_in_backward_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ladder.reserve

    def refused(ladder: Ladder, *blocks: Any, **options: Any) -> bool:
        return not private.in_backward() and right(ladder, *blocks, **options)

    clean()
    before_bytes = torch.cuda.memory_allocated()
    model, optimizer = make(CASE)
    with torchlms.LMS(model, optimizer, budget=CASE.budget_bytes):
        train(model, optimizer, CASE, 4)
        monkeypatch.setattr(Ladder, "reserve", refused)
        with pytest.raises(torchlms.BudgetTooSmall, match="cuDNN would take another algorithm"):
            train(model, optimizer, CASE, 1)
        monkeypatch.undo()
    del model, optimizer
    clean()
    assert torch.cuda.memory_allocated() <= before_bytes + 64 * MIB
