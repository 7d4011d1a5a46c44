"""Counts: how far an engine has come, to be compared with how far it had come before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchlms.eager.engine import Engine


@dataclass(frozen=True, slots=True)
class Counts:
    """Micro-steps begun, bytes moved, and times that memory had run out, since LMS was entered."""

    steps: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    disk_bytes: int = 0
    reclaims: int = 0

    @classmethod
    def of(cls, engine: Engine) -> Counts:
        """As of now."""
        store = engine.store
        return cls(engine.steps, store.bytes_out, store.bytes_in, store.disk_bytes, engine.ladder.reclaims)

    def since(self, before: Counts) -> Counts:
        """What was added."""
        return Counts(
            self.steps - before.steps,
            self.bytes_out - before.bytes_out,
            self.bytes_in - before.bytes_in,
            self.disk_bytes - before.disk_bytes,
            self.reclaims - before.reclaims,
        )
