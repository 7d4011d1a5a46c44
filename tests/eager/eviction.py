"""Everything that can leave does leave between forward and backward, and freed memory is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from sessions import bits
from torch import Tensor

import torchlms
from torchlms.eager.slot import Where

SIDE = 64
Function = Callable[[Tensor, Tensor], Tensor]  # of two leaves of SIDE x SIDE, to something to backward from


def leaves() -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return torch.randn(SIDE, SIDE).requires_grad_(), torch.randn(SIDE, SIDE).div_(8).requires_grad_()


def evict(lms: torchlms.LMS) -> int:
    """Send away whatever may go, then fill the memory that it left; returns how many values are away."""
    assert lms._engine is not None
    lms._engine.ladder.reclaim(1 << 60)
    poison()
    return sum(slot.where is Where.AWAY for slot in lms._engine.living())


def poison() -> None:
    """Have the allocator hand freed blocks out again, and write something else there."""
    for numel in (SIDE, 4 * SIDE, SIDE * SIDE // 2, SIDE * SIDE, 2 * SIDE * SIDE, 4 * SIDE * SIDE):
        blocks = [torch.full((numel,), float("nan")) for _ in range(12)]
        del blocks


def open_wide(disk_dir: Path) -> torchlms.LMS:
    """LMS with a budget that never presses, so that only ``evict`` moves anything."""
    return torchlms.LMS(device="cpu", budget="1GiB", disk_dir=disk_dir)


def gradients(function: Function, lms: torchlms.LMS | None = None) -> tuple[list[str], int]:
    """Bits of the loss and of every gradient, and how many values were away in between."""
    x, w = leaves()
    out = function(x, w)
    away = evict(lms) if lms is not None else 0
    loss = out.abs().sum() if out.is_complex() else out.float().sum()
    found = torch.autograd.grad(loss, (x, w), allow_unused=True)
    return [bits(loss), *(bits(item) for item in found if item is not None)], away


def assert_same_gradients(function: Function, disk_dir: Path, *, moves: bool = True) -> None:
    """Plainly, and with everything away in between."""
    plain, _ = gradients(function)
    assert len(plain) > 1, "no gradient at all"
    with open_wide(disk_dir) as lms:
        moved, away = gradients(function, lms)
        again, _ = gradients(function, lms)
    assert moved == again == plain
    assert (away > 0) is moves
