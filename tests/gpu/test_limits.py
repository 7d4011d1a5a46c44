"""The cap, stepping aside, running out, and leaving nothing behind, on a device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchlms
from tests.gpu.networks import CASES, GIB, MIB, Case, clean, convnet, make, train
from torchlms.eager import private
from torchlms.memory.arena import pinned_bytes_in_use

pytestmark = pytest.mark.gpu


def test_steps_aside_when_everything_fits_and_comes_back() -> None:
    small = Case(convnet, (8, 3, 96, 96), 3 * GIB)
    model, optimizer = make(small)
    with torchlms.LMS(model, optimizer, budget=small.budget_bytes) as lms:
        train(model, optimizer, small, 5)
        assert lms.state == "aside"
        assert private.top_dispatch_mode() is None
        assert private.top_saved_tensor_hooks() is None
        large = CASES["convnet"]
        train(model, optimizer, large, 6)
        assert lms.state == "guard"
        assert lms.stats()["bytes_out_per_step"] > 0


def test_a_budget_below_one_op_is_refused_with_the_smallest_that_works() -> None:
    case = CASES["convnet"]
    model, optimizer = make(case)
    clean()
    with (
        pytest.raises(torchlms.BudgetTooSmall, match="smallest budget") as refused,
        torchlms.LMS(model, optimizer, budget=400 * MIB),
    ):
        train(model, optimizer, case, 3)
    assert refused.value.smallest_bytes > 400 * MIB
    assert "aten" in str(refused.value)
    train(model, optimizer, case, 1)  # the cap is lifted


def test_nothing_is_left_after_an_exception() -> None:
    case = CASES["convnet"]
    fraction = torch.cuda.get_per_process_memory_fraction()
    expandable = private.expandable_segments()
    model, optimizer = make(case)

    def run_and_break() -> None:
        with torchlms.LMS(model, optimizer, budget=case.budget_bytes):
            train(model, optimizer, case, 5)
            F.cross_entropy(model(torch.randn(*case.shape, device="cuda")), torch.zeros(96).long().cuda())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_and_break()
    assert pinned_bytes_in_use() == 0
    assert torch.cuda.get_per_process_memory_fraction() == fraction
    assert private.expandable_segments() == expandable
    assert private.top_dispatch_mode() is None
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes):
        train(model, optimizer, case, 5)


def test_a_graph_that_outlives_the_context_is_whole() -> None:
    case = CASES["convnet"]
    model, optimizer = make(case)
    torch.manual_seed(5)
    x, y = torch.randn(*case.shape, device="cuda"), torch.zeros(96).long().cuda()
    torch.manual_seed(6)
    F.cross_entropy(model(x), y).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model, optimizer = make(case)
    torch.manual_seed(6)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(left, right) for left, right in zip(expected, found, strict=True))
    clean()
