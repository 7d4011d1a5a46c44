"""Custom Functions that look for their parameter itself in ``ctx.saved_tensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import checkpoint
from traps import Trap, assert_same, batch, train

import torchlms


class Accumulating(torch.autograd.Function):
    """A product whose backward adds up the weight's gradient by itself, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, None)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        x, weight, nothing = ctx.saved_tensors
        assert nothing is None
        weight.main_grad.add_(x.T @ grad)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.add_(x.T @ grad)
        return grad @ weight.T, None


class Lenient(Accumulating):
    """Does without the parameter itself where it finds an alias."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        slope = x.T @ grad
        if hasattr(weight, "main_grad"):
            weight.main_grad.add_(slope)
        return grad @ weight.T, None if hasattr(weight, "main_grad") else slope


class Keeping(torch.autograd.Function):
    """Saves a leaf of whatever layout, and does not use it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        ctx.save_for_backward(leaf)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (leaf,) = ctx.saved_tensors
        return grad * (2 if leaf.requires_grad else 3), None


def middle(model: nn.Module, x: Tensor) -> Tensor:
    product: Tensor = Accumulating.apply(F.silu(x), model.product)  # type: ignore[no-untyped-call]
    return F.relu(product)


def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
    if not hasattr(model, "product"):
        model.product = nn.Parameter(torch.eye(64) / 2)
        model.product.main_grad = torch.zeros(64, 64)
        optimizer.add_param_group({"params": [model.product]})
    x, y = batch(step)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach() + model.product.main_grad.sum()).hex()


def test_a_backward_that_writes_to_its_parameter(spill_dir: Path) -> None:
    assert_same(middle, spill_dir, loop)


def test_under_a_checkpoint_it_is_an_alias_as_in_plain_pytorch(spill_dir: Path) -> None:
    def blocks(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda x: Lenient.apply(F.silu(x), model.product).relu(), x, use_reentrant=False)

    assert_same(blocks, spill_dir, loop)


@pytest.mark.parametrize("layout", ["coo", "csr", "jagged"])
def test_a_leaf_of_another_layout(layout: str, spill_dir: Path) -> None:
    """It stays as it is, and where it is."""

    def made() -> Tensor:
        eye = torch.eye(64)
        if layout == "jagged":
            return torch.nested.nested_tensor([eye, eye[:3]], layout=torch.jagged, requires_grad=True)
        return (eye.to_sparse() if layout == "coo" else eye.to_sparse_csr()).requires_grad_()

    def kept(model: nn.Module, x: Tensor) -> Tensor:
        product: Tensor = Keeping.apply(F.silu(x), made())  # type: ignore[no-untyped-call]
        return F.relu(product)

    assert_same(kept, spill_dir)


def test_nothing_is_left_behind(spill_dir: Path) -> None:
    train(middle, spill_dir, loop)
    assert {"saved_tensors", "save_for_backward"}.isdisjoint(vars(BackwardCFunction))


def test_what_somebody_else_puts_there_meanwhile_stays(spill_dir: Path) -> None:
    theirs = property(lambda ctx: ())
    try:
        with torchlms.LMS(nn.Linear(2, 2), budget="1GiB", disk_dir=spill_dir):
            BackwardCFunction.saved_tensors = theirs  # type: ignore[assignment]
        assert vars(BackwardCFunction)["saved_tensors"] is theirs
    finally:
        del BackwardCFunction.saved_tensors
    with torchlms.LMS(nn.Linear(2, 2), budget="1GiB", disk_dir=spill_dir):
        del BackwardCFunction.saved_tensors


def test_a_leaf_that_was_given_other_data_after_it_was_saved(spill_dir: Path) -> None:
    """Plain PyTorch reads the new data, and the parameter is still found."""

    def swapping(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        if not hasattr(model, "product"):
            return loop(model, optimizer, step)
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        product: nn.Parameter = model.product  # type: ignore[assignment]
        product.data = product.data * 0.5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach() + product.main_grad.sum()).hex()  # type: ignore[attr-defined]

    assert_same(middle, spill_dir, swapping)
