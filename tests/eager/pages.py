"""A model of the caching allocator under a cap, and of a program that runs on it, in MiB.

Pages are mapped and unmapped in one endless range of addresses. A block goes to the smallest mapped hole that
takes it, but for the exception in torchlms/memory/compaction.py; else new pages are mapped at the lowest
place with room; else, under the cap, every free page is unmapped first: that is a remap. The cap is compared
with what is mapped and all of the block, wherever that will lie. Values come and go as the tape and the plan
say.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from torchlms.core.plan import Plan
from torchlms.core.tape import Tape
from torchlms.eager import holes as holes_module
from torchlms.eager.holes import Holes
from torchlms.eager.program import Deed, Program
from torchlms.memory.compaction import Block
from torchlms.memory.device import CudaDevice

MIB = 1 << 20
PAGE = 20
ENDLESS = 1 << 40
USED, FREE, UNMAPPED = "used", "free", "unmapped"


class Pages:
    def __init__(self, cap: int, *, page: int = PAGE) -> None:
        self.cap = cap
        self.page = page
        self.used: dict[int, int] = {}
        self.mapped: set[int] = set()
        self.remaps = 0
        self.failures = 0

    def runs(self, device: torch.device | None = None) -> list[list[Block]]:
        """What is mapped, as a snapshot of the allocator tells it."""
        del device
        found: list[list[Block]] = []
        stretches = self._stretches()
        for (start, size, kind), behind in zip(stretches, [*stretches[1:], None], strict=True):
            if kind == UNMAPPED:
                found.append([])
                continue
            spare = behind[1] if behind is not None and behind[2] == UNMAPPED else 0
            found = found or [[]]
            found[-1].append(Block(start * MIB, size * MIB, kind == FREE, spare_bytes=spare * MIB))
        return [run for run in found if run]

    def take(self, size_bytes: int) -> Piece:
        """Where the cap has no room somebody would be evicted; here it is broken, and that counts."""
        piece = self.try_take(size_bytes)
        if piece is not None:
            return piece
        self.failures += 1
        start = self._expand(-(-size_bytes // MIB), cap=1 << 30)
        assert start is not None
        return self._place(start, -(-size_bytes // MIB))

    def try_take(self, size_bytes: int) -> Piece | None:
        """None where the cap has no room."""
        if size_bytes <= MIB:
            return Piece(self.used, -1)  # of the pool of small blocks
        size = -(-size_bytes // MIB)
        start = self._hole(size)
        if start is None:
            start = self._expand(size)
        if start is None:
            self.remaps += 1
            self.unmap()
            start = self._expand(size)
        return self._place(start, size) if start is not None else None

    def _place(self, start: int, size: int) -> Piece:
        self.used[start] = size
        return Piece(self.used, start)

    def _stretches(self) -> list[tuple[int, int, str]]:
        """(start, size, kind) of all that is used, free or unmapped, by address; the last is endless."""
        found: list[tuple[int, int, str]] = []
        mapped = self._mapped_runs()
        at, run = 0, 0
        for start, size in [*sorted(self.used.items()), (ENDLESS, 0)]:
            while at < start:
                while mapped[run][1] <= at:
                    run += 1
                low, high = mapped[run]
                stop, kind = (high, FREE) if low <= at else (low, UNMAPPED)
                found.append((at, min(start, stop) - at, kind))
                at = min(start, stop)
            if size:
                found.append((start, size, USED))
                at = start + size
        return found

    def _mapped_runs(self) -> list[tuple[int, int]]:
        """(start, stop) of mapped pages without a gap, by address, and one that lies beyond all others."""
        pages = sorted(self.mapped)
        starts = [page for page in pages if page - 1 not in self.mapped]
        stops = [page + 1 for page in pages if page + 1 not in self.mapped]
        found = [(low * self.page, high * self.page) for low, high in zip(starts, stops, strict=True)]
        return [*found, (ENDLESS, ENDLESS + 1)]

    def _hole(self, size: int) -> int | None:
        """Where a mapped hole takes a block of ``size``, if any does."""
        stretches = self._stretches()
        holes = sorted(
            (length, start, length + (after[1] if after[2] == UNMAPPED else 0))
            for (start, length, kind), after in pairwise(stretches)
            if kind == FREE and length >= size
        )
        for hole, larger in pairwise(holes):
            if larger[2] >= hole[2]:
                return hole[1]
        return holes[-1][1] if holes else None

    def _expand(self, size: int, *, cap: int | None = None) -> int | None:
        """The lowest place with unmapped pages in it, and those mapped; None if the cap forbids it."""
        if len(self.mapped) * self.page + size > (self.cap if cap is None else cap):
            return None
        stretches = self._stretches()
        for index, (_, _, kind) in enumerate(stretches):
            if kind != UNMAPPED:
                continue
            first = index - 1 if index and stretches[index - 1][2] == FREE else index
            room, last = 0, first
            while last < len(stretches) and stretches[last][2] != USED:
                room += stretches[last][1]
                last += 1
            if room >= size:
                low = stretches[first][0]
                self.mapped.update(range(low // self.page, -(-(low + size) // self.page)))
                return low
        return None

    def unmap(self) -> None:
        """Every page that is free."""
        busy = {
            page
            for start, size in self.used.items()
            for page in range(start // self.page, -(-(start + size) // self.page))
        }
        self.mapped &= busy

    def level(self) -> None:
        self.unmap()
        room = self.cap - len(self.mapped) * self.page - 2 * self.page
        if room > 2 * self.page:
            self.take(room * MIB)


class Piece:
    """Stands for a tensor: gives its place back when the last reference goes."""

    def __init__(self, used: dict[int, int], start: int, unit_bytes: int = MIB) -> None:
        self.used, self.start, self.unit_bytes = used, start, unit_bytes

    @property
    def nbytes(self) -> int:
        return self.used.get(self.start, 0) * self.unit_bytes

    def data_ptr(self) -> int:
        return self.start * self.unit_bytes

    def __del__(self) -> None:
        self.used.pop(self.start, None)


class FakeSlot:
    def __init__(self, value: Any) -> None:
        self.value = value
        self.size_bytes = value.size_bytes
        self.bytes: Any = None
        self.resting = False

    def at_rest(self) -> bool:
        return self.resting and self.bytes is not None

    def move_to(self, target: Piece) -> None:
        self.bytes = target


class FakeSlots(list[FakeSlot]):
    def living(self) -> Any:
        return iter([slot for slot in self if slot.bytes is not None])


class Run:
    """Steps of a program on ``Pages``, with the real ``Holes`` and ``Program``."""

    def __init__(self, tape: Tape, plan: Plan, cap: int, monkeypatch: Any) -> None:
        self.tape, self.pages = tape, Pages(cap)
        self.program = Program(tape, plan)
        self.slots = FakeSlots(FakeSlot(value) for value in tape.values)
        self.decisions = {decision.value: decision for decision in plan.moves}
        self.by_ordinal = {value.saved: value.id for value in tape.values if value.saved >= 0}
        device = object.__new__(CudaDevice)
        device.torch_device, device.cap_bytes = torch.device("cuda", 0), cap * MIB
        self.holes = Holes(device, self.slots)  # type: ignore[arg-type]
        monkeypatch.setattr(holes_module.private, "mapped_runs", self.pages.runs)
        monkeypatch.setattr(holes_module.private, "allocator_remaps", lambda device: self.pages.remaps)
        monkeypatch.setattr(Holes, "_empty", lambda holes, size: self.pages.take(size))
        monkeypatch.setattr(Holes, "_level", lambda holes: self.pages.level())
        self.resident = self.pages.take(tape.resident_bytes)
        self.births: dict[int, list[int]] = {}
        self.deaths: dict[int, list[int]] = {}
        for value in tape.values:
            self.deaths.setdefault(value.death, []).append(value.id)
            if value.birth < 0 and value.death >= len(tape.ops):
                self.slots[value.id].bytes = self.pages.take(value.size_bytes)
            else:
                self.births.setdefault(max(value.birth, 0), []).append(value.id)

    def step(self) -> int:
        """How often the allocator remapped."""
        before = self.pages.remaps
        self.holes.begin_step(self.program)
        cursor = 0
        for op in range(len(self.tape.ops)):
            actions = self.program.actions
            while cursor < len(actions) and actions[cursor].op <= op:
                self._act(actions[cursor])
                cursor += 1
            self._run(op)
            if self.holes.learning:
                self.holes.note(op)
        self.holes.end_step()
        return self.pages.remaps - before

    def _act(self, action: Any) -> None:
        blocks = self.program.blocks_bytes(action.op)
        if action.deed is Deed.UNTUCK:
            self.holes.untuck()
        elif action.deed is Deed.OPEN:
            self.holes.open(blocks)
        elif action.deed is Deed.TUCK:
            self.holes.tuck(blocks)
        else:
            slot = self.slots[self.by_ordinal[action.ordinal]]
            if action.deed is Deed.SEND:
                slot.resting = False
            elif action.deed is Deed.RELEASE:
                slot.bytes = None
            else:
                if action.op in self.program.pinches:
                    self.holes.open((slot.size_bytes,))
                slot.bytes = self.pages.take(slot.size_bytes)

    def _run(self, op: int) -> None:
        for slot in self.slots:
            if slot.value.id in self.decisions:
                continue
            # Until its op asks for it a value is at rest, and actions come before that.
            slot.resting = any(stretch.start <= op + 1 <= stretch.stop for stretch in slot.value.idle)
        for value in self.births.get(op, ()):
            self.slots[value].bytes = self.pages.take(self.slots[value].size_bytes)
        if self.tape.ops[op].scratch_bytes:
            self.pages.take(self.tape.ops[op].scratch_bytes)
        for value in self.deaths.get(op, ()):
            self.slots[value].bytes = None
