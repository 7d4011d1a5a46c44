"""Convolutions keep their speed and bits through planned steps under a cap.

The reference runs in a process of its own, for cuDNN's choice is kept for the life of a thread.
"""

from __future__ import annotations

import statistics
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F

import torchlms
from tests.gpu.networks import CASES, GIB, make, train
from torchlms.eager.backward_thread import run_as_backward
from torchlms.eager.ladder import Ladder

pytestmark = pytest.mark.gpu

SHAPE = (96, 64, 96, 96)  # what each 3x3 convolution of the network sees: 216 MiB in, as much workspace
STEPS = 23  # one recorded, two timed, twenty under the plan


def health() -> tuple[float, str]:
    """Milliseconds of the network's convolution, and a digest of its results."""
    torch.backends.cudnn.deterministic = True
    generator = torch.Generator("cuda").manual_seed(7)
    x = torch.randn(*SHAPE, device="cuda", generator=generator)
    w = torch.randn(64, 64, 3, 3, device="cuda", generator=generator)
    times = []
    y = F.conv2d(x, w, padding=1)
    for _ in range(15):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        F.conv2d(x, w, padding=1)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), str(y.double().sum().item().hex()) + str(y[0, 0, :2, :2].tolist())


def test_convolutions_are_healthy_after_twenty_planned_steps() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        before_ms, before = pool.submit(health).result()
    case = CASES["convnet"]
    model, optimizer = make(case)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes) as lms:
        train(model, optimizer, case, STEPS)
        assert lms.stats()["starved_convolutions"] == 0
    del model, optimizer
    torch.cuda.empty_cache()
    after_ms, after = health()
    assert after == before
    assert after_ms <= 1.15 * before_ms


def test_another_thread_that_runs_backward_chooses_like_the_first() -> None:
    """cuDNN's choice is kept by thread: where both have room they choose alike."""
    x = torch.randn(98, 64, 96, 96, device="cuda")  # a shape that no other test uses
    w = torch.randn(64, 64, 3, 3, device="cuda")
    here = F.conv2d(x, w, padding=1)
    there, thread = run_as_backward(x.device, lambda: (F.conv2d(x, w, padding=1), threading.get_ident()))
    assert thread != threading.get_ident()
    assert torch.equal(here, there)


def leave_room_for(result: torch.Tensor) -> None:
    """Cap the allocator so that a result as large as this one fits, and the workspace beside it does not."""
    room = result.numel() * 4 + (32 << 20)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)


def test_one_that_has_run_with_more_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if what was reserved lay in pieces when it was asked for: cuDNN raises nothing, and we do."""
    shape = (95, 64, 96, 96)  # a shape no other test uses: it is spoiled afterwards
    x = torch.randn(*shape, device="cuda")
    w = torch.randn(64, 64, 3, 3, device="cuda", requires_grad=True)
    torch.cuda.empty_cache()
    with torchlms.LMS(device="cuda", budget=2 * GIB):
        loss = F.conv2d(x, w, padding=1).sum()
        del loss
        monkeypatch.setattr(Ladder, "reserve", lambda *_, **__: True)
        torch.cuda.empty_cache()
        leave_room_for(x)
        with pytest.raises(torchlms.BudgetTooSmall, match="an allocation failed inside"):
            F.conv2d(x, w, padding=1)


def test_a_starved_convolution_is_noticed() -> None:
    """The counter works: without room made beforehand, cuDNN swallows the failure and we still see it."""
    shape = (97, 64, 96, 96)  # a shape no other test uses: it is spoiled afterwards
    x = torch.randn(*shape, device="cuda")
    w = torch.randn(64, 64, 3, 3, device="cuda", requires_grad=True)
    torch.cuda.empty_cache()
    lms = torchlms.LMS(device="cuda", budget=2 * GIB)
    with lms:
        assert lms._engine is not None
        leave_room_for(x)
        F.conv2d(x, w, padding=1).sum().backward()
        lms._engine.end_microstep()
        assert lms.stats()["starved_convolutions"] > 0
