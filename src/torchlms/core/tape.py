"""Tape: what one training step did. Ops in order, the values they touched, and when each lay idle.

A step repeats, so a tape is a ring: op 0 follows the last op. A value that outlives the step (a
parameter, an optimizer state) has ``birth == -1`` and ``death == len(ops)``, and an idle stretch
of such a value may wrap around the end.

Op index ``i`` is also a moment: "before op i". All spans are in op indices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from torchlms.core.record import load_record, save_record

SCHEMA = "torchlms.tape/1"


class Kind(str, Enum):
    """What a value is to the training step."""

    INPUT = "input"
    ACTIVATION = "activation"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    GRADIENT = "gradient"
    STATE = "state"  # an optimizer's
    OTHER = "other"


class Phase(str, Enum):
    """Which part of the step an op belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BETWEEN = "between"  # optimizer, data, evaluation: from the end of backward to the next forward


@dataclass(frozen=True, slots=True)
class Stretch:
    """Moments during which no op touches the value and it could be elsewhere: ``start <= i < stop``.

    ``start`` is the first op before which the bytes could be let go, ``stop`` the op before which
    they must be back. ``stop <= start`` means that the stretch wraps around the end of the tape.
    Until before op ``held_until`` the program holds the value beside the autograd graph (None: never
    during the stretch): it can be moved, but not dropped. With ``touched`` it ends because an op reads
    or writes the value, otherwise because autograd asks for it.
    """

    start: int
    stop: int
    held_until: int | None = None
    touched: bool = False

    @property
    def free_from(self) -> int:
        """The first op before which nobody but the autograd graph holds the value."""
        return self.start if self.held_until is None else self.held_until


@dataclass(frozen=True, slots=True)
class Value:
    """The bytes of one storage during one lifetime.

    ``birth`` is the op that allocates it (-1: there before op 0), ``death`` the last op during
    which it is allocated (``len(ops)``: it outlives the tape). ``saved`` is its ordinal among the
    storages that autograd saved in this step, -1 if it was never saved, and ``saved_at`` the op
    before which it was first saved. ``movable`` says that the executor is able to move it during
    its idle stretches; ``why_not`` says why it is not.
    ``recipe`` are the ops that would make it again, empty if it cannot be, and ``sources`` the saved
    values that these read. ``held`` are stretches that plans may count as idle only where the program
    may be left with empty storages (``with_held``).
    """

    id: int
    kind: Kind
    size_bytes: int
    birth: int
    death: int
    idle: tuple[Stretch, ...] = ()
    saved: int = -1
    saved_at: int = -1
    movable: bool = False
    why_not: str = ""
    op: str = ""
    module: str = ""
    recipe: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    held: tuple[Stretch, ...] = ()


@dataclass(frozen=True, slots=True)
class Op:
    """One dispatched operator. ``reads`` and ``writes`` are value ids; ``scratch_bytes`` is what it
    allocates beyond its results and frees before it ends."""

    name: str
    module: str
    phase: Phase
    time_s: float
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    scratch_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tape:
    """One recorded step. ``resident_bytes`` is memory in use throughout that no value describes."""

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    resident_bytes: int
    device: str
    torch: str
    model: str = ""
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        for index, value in enumerate(self.values):
            if value.id != index:
                raise ValueError(f"value {index} carries id {value.id}; ids are positions")

    @property
    def fingerprint(self) -> str:
        """Names the computation: ops, sizes of what they touch, order of saving; no times."""
        digest = hashlib.sha256()
        # Where the batch is a view, the storage of what comes in is the whole data set's.
        known = [value.birth >= 0 or value.kind is Kind.PARAMETER for value in self.values]
        for op in self.ops:
            if op.phase is not Phase.BETWEEN:
                touched = (*op.reads, *op.writes)
                sizes = [self.values[value].size_bytes for value in touched if known[value]]
                digest.update(f"{op.name}|{op.phase.value}|{sizes}\n".encode())
        for value in self.values:
            if value.saved >= 0:
                digest.update(f"{value.saved}:{value.size_bytes}\n".encode())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        save_record(self, path)

    @staticmethod
    def load(path: str | Path) -> Tape:
        return load_record(Tape, path, schema=SCHEMA)
