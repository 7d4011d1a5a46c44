"""What the tests of all trainers share: peaks of plain runs, the bits that are left, what is on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sessions import bits

import torchlms
from torchlms.bench.peak import LedgerMode
from torchlms.eager import private
from torchlms.eager.install import WatchMode
from torchlms.memory.ledger import Ledger

SMALL = {"min_bytes": 1024}  # rules under which values as small as those of these networks move


def peak_bytes(train: Callable[[], Any]) -> int:
    """The highest sum of live storages while ``train`` runs; most of it must be activations."""
    ledger = Ledger()
    with LedgerMode(ledger, torch.device("cpu")):
        train()
    return ledger.peak_bytes


def all_bits(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    return {name: bits(tensor) for name, tensor in tensors}


def state_bits(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    states = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": bits(item)
        for index, state in states.items()
        for name, item in state.items()
        if isinstance(item, torch.Tensor)
    }


def is_on() -> bool:
    """Whether the ops of this thread go through LMS now."""
    return isinstance(private.top_dispatch_mode(), WatchMode)


def assert_values_moved(lms: torchlms.LMS | None) -> None:
    """In the steps that followed the plan, and by the plan."""
    assert lms is not None
    stats = lms.stats()
    assert lms.plan is not None
    assert lms.plan.moves
    assert stats["bytes_out_per_step"] > 0
    assert stats["bytes_in_per_step"] > 0
    assert stats["peak_device_bytes"] <= stats["budget_bytes"]


def assert_off_for_good() -> None:
    """Nothing is on, and another LMS can be entered."""
    assert not is_on()
    assert private.top_saved_tensor_hooks() is None
    with torchlms.LMS(device="cpu"):
        assert is_on()
    assert not is_on()
