"""Plan: what happens to each value of a tape during each idle stretch, and when."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from torchlms.core.record import load_record, save_record

SCHEMA = "torchlms.plan/2"


class Choice(str, Enum):
    """Where a value spends an idle stretch."""

    KEEP = "keep"
    HOST = "host"
    DISK = "disk"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be in use at once on each tier."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """One value, one stretch, one choice.

    The copy out is issued before op ``stretch.start``. Before op ``release_op`` the compute queue
    waits for it and the device bytes are let go; before op ``reload_op`` device bytes are allocated
    again and the copy back is issued; the first use is before op ``stretch.stop``. So the value is
    absent during ops ``release_op <= i < reload_op``. ``offset_bytes`` is its place in the host
    arena (HOST) or in the spill file (DISK); -1 for KEEP and RECOMPUTE. ``passing``: where others are
    made from the value before ``reload_op``, it is made for each of them and let go of again.
    """

    value: int
    stretch: int
    choice: Choice
    release_op: int = -1
    reload_op: int = -1
    offset_bytes: int = -1
    reason: str = ""
    passing: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the simulator says of a plan, for one step.

    ``peak_device_bytes`` counts allocated bytes. ``compute_s`` is the sum of op times, ``stall_s``
    what the compute queue waits for copies, ``step_s`` their sum. ``arena_bytes`` is the size of
    the pinned host arena, ``spill_bytes`` that of the spill file.
    """

    peak_device_bytes: int
    peak_op: int
    step_s: float
    compute_s: float
    stall_s: float
    bytes_out: int = 0
    bytes_in: int = 0
    disk_bytes: int = 0
    arena_bytes: int = 0
    spill_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Decisions for one tape under one budget. A stretch without a decision is kept."""

    fingerprint: str
    torch: str
    device: str
    budget: Budget
    decisions: tuple[Decision, ...]
    predicted: Prediction
    smallest_bytes: int = 0
    plan_s: float = 0.0
    model: str = ""
    schema: str = SCHEMA

    @property
    def moves(self) -> tuple[Decision, ...]:
        """The decisions that move or drop something."""
        return tuple(decision for decision in self.decisions if decision.choice is not Choice.KEEP)

    def save(self, path: str | Path) -> None:
        save_record(self, path)

    @staticmethod
    def load(path: str | Path) -> Plan:
        return load_record(Plan, path, schema=SCHEMA)
