"""Hazards: copies that take their time, and memory that is not what it was as soon as it is let go."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchlms.eager.engine import Engine
from torchlms.eager.slot import Slot
from torchlms.memory.store import Store

POISON = 0xD5  # as a float of any width a large negative number
_LONGEST_S = 0.003
_LONGEST_CYCLES = 4_000_000  # some two milliseconds of a device


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are let go, and those into which a value will come back, are overwritten: whoever reads
    either too late or too early does not get the right ones by luck."""
    leaving, allocate = Engine.leaving, Engine.allocate

    def poisoned_leaving(self: Engine, slot: Slot) -> None:
        leaving(self, slot)
        assert slot.bytes is not None
        slot.bytes.fill_(POISON)

    def poisoned_allocate(self: Engine, size_bytes: int, *, early: bool = False) -> torch.Tensor:
        return allocate(self, size_bytes, early=early).fill_(POISON)

    monkeypatch.setattr(Engine, "leaving", poisoned_leaving)
    monkeypatch.setattr(Engine, "allocate", poisoned_allocate)


def delay_disk(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Each read and write of a file waits for a while, drawn anew, before it begins."""
    draw = random.Random(seed)

    def late(right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            time.sleep(draw.random() * _LONGEST_S)
            return right(*arguments)

        return call

    for name in ("pwrite", "preadv"):
        monkeypatch.setattr(os, name, late(getattr(os, name)))


def delay_streams(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """CUDA: each copy, and now and then the computing, sits behind a sleep on its stream."""
    draw = random.Random(seed)

    def late(which: int, right: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Store, *arguments: Any) -> Any:
            with torch.cuda.stream(self._open_streams()[which]):
                torch.cuda._sleep(draw.randrange(_LONGEST_CYCLES))
            if draw.random() < 0.2:
                torch.cuda._sleep(draw.randrange(_LONGEST_CYCLES))
            return right(self, *arguments)

        return call

    for which, name in enumerate(("_device_to_host", "_host_to_device")):
        monkeypatch.setattr(Store, name, late(which, getattr(Store, name)))
