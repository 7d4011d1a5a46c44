"""Draft: a value or an op of the tape while its step still runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchlms.core.tape import Kind, Op, Stretch, Value

if TYPE_CHECKING:
    from torchlms.core.tape import Phase
    from torchlms.memory.device import Mark

_LEAST_HELD_OPS = 2  # shorter stretches are not worth a copy there and back


@dataclass(slots=True)
class ValueDraft:
    """What has been seen of a value so far; ops are counted from the beginning of the tape."""

    kind: Kind
    size_bytes: int
    birth: int
    op: str = ""
    module: str = ""
    death: int | None = None
    saved: int = -1
    saved_at: int = -1
    idle_from: int | None = None  # of a stretch that has not ended yet
    used_in: int | None = None  # the backward pass that asked for it last
    idle: list[Stretch] = field(default_factory=list)
    held: list[Stretch] = field(default_factory=list)
    lendable: bool = True
    touched: int = -1  # the op that read or wrote it last
    recipe: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()

    def forget_graph(self) -> None:
        """It was saved by a graph that is gone: what that saw of the value is no matter."""
        self.idle_from = self.used_in = None
        self.idle.clear()
        self.held.clear()
        self.recipe = self.sources = ()

    def note_held(self, now: int, *, touched: bool = False) -> None:
        """Until op ``now`` the program held the saved value, and perhaps did nothing with it for a while."""
        start = max(self.touched + 1, self.saved_at)
        first = self.saved >= 0 and self.idle_from is None and self.used_in is None and not self.idle
        if first and self.lendable and now - start >= _LEAST_HELD_OPS:
            self.held.append(Stretch(start, now, held_until=now, touched=touched))

    def finished(self, index: int, ops: int) -> Value:
        """The value with id ``index`` of a tape of ``ops`` ops."""
        death = ops if self.death is None else self.death
        # An optimizer makes its states at the end of its first step; every later lap begins with them.
        lasting = self.kind is Kind.STATE and self.death is None
        return Value(
            id=index,
            kind=self.kind,
            size_bytes=self.size_bytes,
            birth=-1 if lasting else self.birth,
            death=max(death, self.birth, 0),
            idle=tuple(self.idle),
            saved=self.saved,
            saved_at=self.saved_at,
            movable=bool(self.idle),
            why_not=self._why_not(),
            op=self.op,
            module=self.module,
            recipe=self.recipe if self.idle and min(self.sources, default=0) >= 0 else (),
            sources=self.sources,
            held=tuple(self.held),
        )

    def _why_not(self) -> str:
        """Why a saved value cannot move; nothing for one that can, or was not saved."""
        if self.saved < 0 or self.idle:
            return ""
        if self.used_in is None:
            return "saved, but never asked for"
        hint = ": rule held lets such values leave" if self.held else ""
        return f"somebody else holds it until it is needed{hint}"


@dataclass(slots=True)
class OpDraft:
    """An op that has run, between two marks of the device."""

    name: str
    module: str
    phase: Phase
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    scratch_bytes: int
    begin: Mark
    end: Mark

    def finished(self) -> Op:
        """Once the device has passed both marks."""
        time_s = self.end.since_s(self.begin)
        return Op(self.name, self.module, self.phase, time_s, self.reads, self.writes, self.scratch_bytes)
