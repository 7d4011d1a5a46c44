"""A model of the caching allocator under a cap, and of a program that runs on it, in MiB.

Pages of 20 MiB are mapped and unmapped in one endless range of addresses. A block goes to the smallest
mapped hole that takes it; else new pages are mapped at the lowest place with room; else, under the cap,
every free page is unmapped first: that is a remap. Values come and go as the tape and the plan say.
"""

from __future__ import annotations

from typing import Any

import torch

from torchlms.core.plan import Plan
from torchlms.core.tape import Tape
from torchlms.eager import holes as holes_module
from torchlms.eager.holes import Holes
from torchlms.eager.program import Deed, Program
from torchlms.memory.device import CudaDevice

MIB = 1 << 20
PAGE = 20


class Pages:
    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.used: dict[int, int] = {}
        self.mapped: set[int] = set()
        self.remaps = 0
        self.failures = 0

    def free_runs(self, *, unmapped_too: bool = False, top: int = 1 << 20) -> list[tuple[int, int]]:
        """(start, stop) of what is free, by address; with ``unmapped_too`` up to ``top``."""
        found, at = [], 0
        for start, size in [*sorted(self.used.items()), (top, 0)]:
            if start > at:
                found.append((at, start))
            at = max(at, start + size)
        return found if unmapped_too else [piece for run in found for piece in self._mapped(*run)]

    def _mapped(self, start: int, stop: int) -> list[tuple[int, int]]:
        pieces: list[tuple[int, int]] = []
        for page in range(start // PAGE, min(-(-stop // PAGE), max(self.mapped, default=0) + 1)):
            if page not in self.mapped:
                continue
            low, high = max(start, page * PAGE), min(stop, (page + 1) * PAGE)
            if pieces and pieces[-1][1] == low:
                pieces[-1] = (pieces[-1][0], high)
            else:
                pieces.append((low, high))
        return pieces

    def runs(self, device: torch.device | None = None) -> list[list[tuple[int, int, bool]]]:
        del device
        pieces = [(start, start + size, False) for start, size in self.used.items()]
        pieces += [(start, stop, True) for start, stop in self.free_runs()]
        found: list[list[tuple[int, int, bool]]] = []
        end = -1
        for start, stop, free in sorted(pieces):
            if start != end:
                found.append([])
            found[-1].append((start * MIB, (stop - start) * MIB, free))
            end = stop
        return found

    def take(self, size_bytes: int) -> Piece:
        if size_bytes <= MIB:
            return Piece(self.used, -1)  # of the pool of small blocks
        size = -(-size_bytes // MIB)
        fitting = [(stop - start, start) for start, stop in self.free_runs() if stop - start >= size]
        if fitting:
            return self._place(min(fitting)[1], size)
        start = self._expand(size)
        if start is None:
            self.remaps += 1
            self._unmap()
            start = self._expand(size)
        if start is None:  # somebody would be evicted now; here the cap is broken, and that counts
            self.failures += 1
            start = self._expand(size, cap=1 << 30)
        assert start is not None
        return self._place(start, size)

    def _place(self, start: int, size: int) -> Piece:
        self.used[start] = size
        return Piece(self.used, start)

    def _expand(self, size: int, *, cap: int | None = None) -> int | None:
        """The lowest place with unmapped pages in it, and those mapped; None if the cap forbids it."""
        for start, stop in self.free_runs(unmapped_too=True):
            beginnings = [
                page * PAGE
                for page in range(start // PAGE + 1, stop // PAGE)
                if page in self.mapped and page - 1 not in self.mapped
            ]
            for low in [start, *beginnings]:
                wanted = range(low // PAGE, -(-(low + size) // PAGE))
                pages = [page for page in wanted if page not in self.mapped]
                if stop - low < size or not pages:
                    continue
                if (len(self.mapped) + len(pages)) * PAGE > (self.cap if cap is None else cap):
                    return None
                self.mapped.update(pages)
                return low
        return None

    def _unmap(self) -> None:
        busy = {
            page
            for start, size in self.used.items()
            for page in range(start // PAGE, -(-(start + size) // PAGE))
        }
        self.mapped &= busy

    def level(self) -> None:
        self._unmap()
        room = self.cap - len(self.mapped) * PAGE - 40
        if room > 40:
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
