"""A saved tensor that is modified in place is noticed as without LMS, whether it stayed or moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eviction import SIDE, evict, leaves, open_wide
from sessions import bits
from torch import Tensor, nn

import torchlms

Spoil = Callable[[], Tensor]  # makes a graph, modifies what it saved, returns what to go backward from


def an_output() -> Tensor:
    y = leaves()[0].exp()
    loss = y.sum()
    y.add_(1)
    return loss


def a_small_output() -> Tensor:
    """Below the size that is worth a slot."""
    y = leaves()[0][0, :5].exp()
    loss = y.sum()
    y.add_(1)
    return loss


def an_input() -> Tensor:
    x, w = leaves()
    h = x * 2
    loss = (h * w).sum()
    h.relu_()
    return loss


def a_view_of_it() -> Tensor:
    h = leaves()[0] * 2
    loss = h.square().sum()
    h[3].zero_()
    return loss


def its_base() -> Tensor:
    h = leaves()[0] * 2
    loss = h.t()[4:].square().sum()
    h.mul_(3)
    return loss


def a_leaf() -> Tensor:
    x, w = leaves()
    loss = (x @ w).sum()
    with torch.no_grad():
        w.add_(1)
    return loss


def a_parameter() -> Tensor:
    layer = nn.Linear(SIDE, SIDE)
    loss = layer(leaves()[0]).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    return loss


def a_buffer() -> Tensor:
    layer = nn.Module()
    layer.register_buffer("scale", torch.randn(SIDE, SIDE))
    loss = (leaves()[0] * layer.scale).sum()
    layer.scale.fill_(1)  # type: ignore[union-attr,operator]
    return loss


def a_detached_alias() -> Tensor:
    h = leaves()[0] * 2
    loss = h.exp().sum() + h.square().sum()
    h.detach().add_(1)
    return loss


def an_optimizer_step() -> Tensor:
    first, second = nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 1)
    loss = second(first(leaves()[0]).sigmoid()).sum()
    loss.backward(retain_graph=True)
    torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1).step()
    return loss


class Dirty(torch.autograd.Function):
    """Its backward modifies what it saved, which may be done once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return y.mul_(grad)


def by_backward_itself() -> Tensor:
    loss = Dirty.apply(leaves()[0]).sum()
    loss.backward(retain_graph=True)
    return loss


CASES = [
    an_output,
    a_small_output,
    an_input,
    a_view_of_it,
    its_base,
    a_leaf,
    a_parameter,
    a_buffer,
    a_detached_alias,
    an_optimizer_step,
    by_backward_itself,
]


def complaint(spoil: Spoil, lms: torchlms.LMS | None = None) -> str:
    loss = spoil()
    if lms is not None:
        evict(lms)
    with pytest.raises(RuntimeError) as raised:
        loss.backward()
    assert type(raised.value) is RuntimeError
    return str(raised.value)


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_the_same_complaint(spoil: Spoil, spill_dir: Path) -> None:
    plain = complaint(spoil)
    assert plain.startswith("one of the variables needed for gradient computation has been modified by an in")
    with open_wide(spill_dir) as lms:
        ours = complaint(spoil, lms)
    begin = len(
        "one of the variables needed for gradient computation has been modified by an inplace operation: ["
    )
    assert ours[:begin] == plain[:begin]
    assert ours[begin:].split("]")[0] == plain[begin:].split("]")[0]  # type and shape
    assert ours.split(" is at ")[1].split(" instead")[0] == plain.split(" is at ")[1].split(" instead")[0]


def test_modified_after_it_came_back(spill_dir: Path) -> None:
    """A value that was away, was brought back by one backward pass, and is modified before the next."""

    def twice(lms: torchlms.LMS | None) -> str:
        x, _ = leaves()
        h = Dirty.apply(x.sin().exp())
        loss = (h * h).sum()
        if lms is not None:
            del h
            assert evict(lms) >= 2
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError) as raised:
            loss.backward()
        return str(raised.value)[:100]

    plain = twice(None)
    with open_wide(spill_dir) as lms:
        assert twice(lms) == plain


def test_modified_once_within_backward_is_fine(spill_dir: Path) -> None:
    def once(lms: torchlms.LMS | None) -> str:
        x, _ = leaves()
        loss = Dirty.apply(x.sin()).exp().sum()
        if lms is not None:
            assert evict(lms) >= 2
        loss.backward()
        assert x.grad is not None
        return bits(x.grad)

    plain = once(None)
    with open_wide(spill_dir) as lms:
        assert once(lms) == plain


@pytest.mark.parametrize("held", [True, False])
def test_writes_through_data_are_seen_by_backward(held: bool, spill_dir: Path) -> None:
    """They count as no modification: plain PyTorch computes with what is there at backward."""

    def written(lms: torchlms.LMS | None) -> list[str]:
        x, w = leaves()
        h = x.sin()
        loss = (h * w).exp().sum()
        h.data.mul_(3)
        w.data[4:].fill_(2)
        if not held:
            del h
        if lms is not None:
            evict(lms)
        if held:
            h.data.add_(1)
        loss.backward()
        assert x.grad is not None
        assert w.grad is not None
        return [bits(x.grad), bits(w.grad)]

    plain = written(None)
    with open_wide(spill_dir) as lms:
        assert written(lms) == plain


def test_a_held_value_never_leaves(spill_dir: Path) -> None:
    """Whoever holds a tensor, a view of it or its bytes may write; so it stays."""
    with open_wide(spill_dir) as lms:
        x, _ = leaves()
        h = x.sin()
        loss = h.exp().sum()
        view = h[3:]
        assert evict(lms) == 1  # what exp saved
        del h
        assert evict(lms) == 1
        raw = view.detach().numpy()
        del view
        assert evict(lms) == 1
        raw[:] = 0
        del raw
        assert evict(lms) == 1  # exp saves its result alone: nobody needs h
        loss.backward()
