"""What the tests of all trainers share: peaks of plain runs, the bits that are left, what is on."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import bits

import torchlms
from torchlms.bench.peak import LedgerMode
from torchlms.eager import private
from torchlms.eager.install import WatchMode
from torchlms.memory.ledger import Ledger

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

from callbacks import Clock

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


def csv_steps(path: Path) -> list[int]:
    """The numbers of the steps that a callback wrote a row of."""
    rows = list(csv.DictReader(path.open()))
    assert all(float(row["seconds"]) > 0 for row in rows)
    return [int(row["step"]) for row in rows]


def assert_off_for_good() -> None:
    """Nothing is on, and another LMS can be entered."""
    assert not is_on()
    assert private.top_saved_tensor_hooks() is None
    with torchlms.LMS(device="cpu"):
        assert is_on()
    assert not is_on()


def own_share(
    callback_type: Any, options: dict[str, Any], train: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, float]:
    """A callback that went through ``train``, and which share of that was its own: the processor time of its
    methods, without that of entering and leaving LMS. Both in one run, for two runs of a busy machine differ
    by more than a callback takes."""

    clock = Clock()

    class Timed(callback_type):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return clock.counts(found, 1) if name.startswith("on_") else found

    callback = Timed(**options)
    for name in ("__enter__", "__exit__"):
        monkeypatch.setattr(torchlms.LMS, name, clock.counts(getattr(torchlms.LMS, name), -1))
    began_s = time.process_time()
    train(callback)
    return callback, clock.own_s / (time.process_time() - began_s)
