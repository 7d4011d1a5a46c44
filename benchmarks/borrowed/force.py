"""Force: LMS that moves what it would never find worth moving, and memory overwritten once it is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchlms
from torchlms import api
from torchlms.bench.peak import LedgerMode
from torchlms.core.machine import Machine
from torchlms.eager import saver
from torchlms.eager.slot import Where
from torchlms.memory.ledger import Ledger

_WIDE_BYTES = 2 << 30
_EVERYTHING_BYTES = 1 << 60
_FAST, _SLOW = 1e9, 1e6  # bytes per second; where moving is slow, what can be made again is
_POISONED_NUMELS = (8, 64, 512, 4096, 1 << 15)
_POISONED_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Force:
    """``everything``: a rule moves every value in each stretch in which it lies idle, and besides all that
    may leaves before some of the backward passes. Else the budget alone presses."""

    budget_bytes: int = _WIDE_BYTES
    everything: bool = True
    recompute: bool = False


@contextmanager
def forced_on(force: Force, model: nn.Module | None, disk_dir: Path) -> Iterator[torchlms.LMS]:
    """LMS under ``force``. Values move from one byte on, where as a rule 512 are not worth a slot."""
    rules: dict[str, Any] = {"min_bytes": 0, "recompute": force.recompute}
    if force.everything:
        rules["move_ops"] = ("*",)
    rate = _SLOW if force.recompute else _FAST

    def machine(*args: Any, **options: Any) -> Machine:
        del args, options  # the rates of this machine do not matter here, and to measure them takes seconds
        return Machine(
            device="cpu",
            device_bytes=force.budget_bytes,
            torch=torch.__version__,
            disk_write_bytes_per_s=rate,
            disk_read_bytes_per_s=rate,
        )

    least_bytes, measured = saver._LEAST_BYTES, api.measured_machine
    saver._LEAST_BYTES, api.measured_machine = 1, machine
    try:
        with torchlms.LMS(
            model, device="cpu", budget=force.budget_bytes, disk_dir=disk_dir, rules=rules
        ) as lms:
            yield lms
    finally:
        saver._LEAST_BYTES, api.measured_machine = least_bytes, measured


def evict(lms: torchlms.LMS) -> None:
    """Send away whatever may go, and write over the memory that it left."""
    assert lms._engine is not None
    lms._engine.ladder.reclaim(_EVERYTHING_BYTES)
    for numel in _POISONED_NUMELS:
        blocks = [torch.full((numel,), float("nan")) for _ in range(_POISONED_BLOCKS)]
        del blocks


def away(lms: torchlms.LMS) -> int:
    """How many values are not in device memory just now."""
    assert lms._engine is not None
    return sum(slot.where in (Where.AWAY, Where.DROPPED) for slot in lms._engine.living())


@contextmanager
def ledger_watch() -> Iterator[Ledger]:
    """Counts live bytes, and does nothing else to the ops that come by."""
    ledger = Ledger()
    with LedgerMode(ledger, torch.device("cpu")):
        yield ledger
