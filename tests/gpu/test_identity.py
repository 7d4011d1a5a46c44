"""Same bits under a cap as without one, on a device, along every path a value can take."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import torchlms
from tests.gpu.networks import CASES, GIB, make, plain, same, state, train
from torchlms.memory.device import CudaCopy
from torchlms.memory.store import Store

pytestmark = pytest.mark.gpu
STEPS = 8


@pytest.mark.parametrize("name", CASES)
def test_same_bits_under_a_cap(name: str) -> None:
    case = CASES[name]
    losses, end = plain(case, STEPS)
    model, optimizer = make(case)
    begin = state(model)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes) as lms:
        assert train(model, optimizer, case, STEPS) == losses
        stats = lms.stats()
    assert same(end, state(model))
    assert not same(begin, state(model))
    assert stats["state"] == "guard"
    assert stats["bytes_out_per_step"] > 0
    assert stats["starved_convolutions"] == 0
    assert stats["peak_reserved_bytes"] <= case.budget_bytes
    predicted = stats["predicted"]["peak_device_bytes"]
    assert abs(predicted - stats["peak_device_bytes"]) <= 0.05 * predicted


@pytest.mark.parametrize("name", CASES)
def test_same_bits_with_values_made_again(name: str) -> None:
    case = CASES[name]
    losses, end = plain(case, STEPS)
    model, optimizer = make(case)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes, recompute=True) as lms:
        assert train(model, optimizer, case, STEPS) == losses
        stats = lms.stats()
    assert same(end, state(model))
    assert stats["state"] == "guard"
    assert stats["plan"]["recompute"]["values"] > 0
    assert stats["peak_reserved_bytes"] <= case.budget_bytes


def test_most_ops_of_a_planned_step_are_only_run() -> None:
    case = CASES["transformer"]
    model, optimizer = make(case)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes) as lms:
        train(model, optimizer, case, 80)  # recorded, planned, raced, and then learned what is quiet
        engine = lms._engine
        assert engine is not None
        (program,) = engine.routines.programs()
        assert program.lessons == 0
        quiet = sum(func is not None for func in program.quiet)
    assert quiet > 0.5 * len(program.tape.ops)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_through_the_disk(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    losses, end = plain(case, STEPS)
    model, optimizer = make(case)
    options: dict[str, Any] = {
        "host_budget": 1 * GIB, "disk_dir": tmp_path, "disk_budget": 8 * GIB, "rules": {"recompute": False}
    }  # fmt: skip
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes, **options) as lms:
        assert train(model, optimizer, case, STEPS) == losses
        assert lms.stats()["disk_bytes_per_step"] > 0
    assert same(end, state(model))


@pytest.mark.parametrize("name", CASES)
def test_slow_copies_lose_no_race(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy sits behind a sleep on its stream, so a missing wait reads or frees too early."""
    case = CASES[name]
    losses, end = plain(case, STEPS)

    def asleep(which: int) -> Any:
        method = ("_device_to_host", "_host_to_device")[which]
        original = getattr(Store, method)

        def slow(self: Store, *arguments: Any) -> Any:
            stream = self._open_streams()[which]
            with torch.cuda.stream(stream):
                torch.cuda._sleep(3_000_000)
            return original(self, *arguments)

        return method, slow

    for which in (0, 1):
        monkeypatch.setattr(Store, *asleep(which))
    model, optimizer = make(case)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes) as lms:
        assert train(model, optimizer, case, STEPS) == losses
        assert lms.stats()["bytes_out_per_step"] > 0
    assert same(end, state(model))


def without_waits() -> list[str]:
    """Losses of a run in which copies are slow and nobody waits for them; in a process of its own,
    for the device may well fault."""
    torch.backends.cudnn.deterministic = True
    original = Store._host_to_device

    def slow(self: Store, *arguments: Any) -> Any:
        with torch.cuda.stream(self._open_streams()[1]):
            torch.cuda._sleep(30_000_000)
        return original(self, *arguments)

    Store._host_to_device = slow  # type: ignore[method-assign]
    CudaCopy.wait = lambda self: None  # type: ignore[method-assign]
    case = CASES["convnet"]
    model, optimizer = make(case)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes):
        return train(model, optimizer, case, STEPS)


def test_a_missing_wait_would_show() -> None:
    """The test above can fail: without the waits, slow copies change the result or fault."""
    losses, _ = plain(CASES["convnet"], STEPS)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        broken = pool.submit(without_waits)
        try:
            found = broken.result()
        except Exception:
            return
    assert found != losses


def test_changing_batches_keep_their_bits() -> None:
    case = CASES["convnet"]
    batches = [96, 64, 96, 17, 64, 96, 64, 96]

    def run(model: Any, optimizer: Any) -> list[str]:
        torch.manual_seed(3)
        losses = []
        for batch in batches:
            x = torch.randn(batch, *case.shape[1:], device="cuda")
            loss = torch.nn.functional.cross_entropy(model(x), torch.randint(0, 10, (batch,), device="cuda"))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item().hex())
        return losses

    model, optimizer = make(case)
    losses = run(model, optimizer)
    end = state(model)
    model, optimizer = make(case)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes):
        assert run(model, optimizer) == losses
    assert same(end, state(model))
