"""Custom Functions that look for their parameter itself in ``ctx.saved_tensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from traps import Trap, assert_same, batch, train


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


def test_nothing_is_left_behind(spill_dir: Path) -> None:
    train(middle, spill_dir, loop)
    assert "saved_tensors" not in vars(BackwardCFunction)


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
