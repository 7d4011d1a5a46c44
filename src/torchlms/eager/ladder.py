"""Ladder: what happens when memory runs out. Let go of what was leaving anyway, evict, retry, refuse.

An op is retried only where that is safe: the first attempt must not have changed its inputs, and a
random op gets its generator back first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from torchlms.eager.refusals import Refusals
from torchlms.eager.slot import Slot, Where
from torchlms.eager.tensors import all_plain, new_bytes, tensors_in, unwritten
from torchlms.errors import HostBudgetTooSmall, SpillError

if TYPE_CHECKING:
    from torchlms.eager.lent import Operands
    from torchlms.eager.sizes import ResultSizes
    from torchlms.memory.device import CpuDevice, CudaDevice
    from torchlms.memory.store import Store

EVERYTHING_BYTES = 1 << 62  # to ask for, to have everything leave that can
_ASKED = re.compile(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SMALL_BYTES = 1 << 20
_ROUND_BYTES = 64 << 20  # evicting less than this at a time is not worth an allocator round
_MOST_PASSES = 4  # over blocks that find room each time, but not in the same places


class Population(Protocol):
    """The slots there are, oldest first: the order in which backward needs them last."""

    def living(self) -> Iterator[Slot]: ...

    def spare(self) -> Iterator[Slot]:
        """Those that no saved tensor has: recipes alone will read them."""

    def may_lend(self, slot: Slot) -> bool:
        """Whether the slot may leave now although the program itself holds it."""


class Ladder:
    """Makes room under the budget, or says why it cannot."""

    def __init__(
        self,
        device: CudaDevice | CpuDevice,
        store: Store,
        slots: Population,
        sizes: ResultSizes,
        budget_bytes: int,
        collect: Callable[[], None] = lambda: None,
        forget: Callable[[bool], None] = lambda refusing: None,
        give_back: Callable[[], int] = lambda: 0,
    ) -> None:
        """``collect`` has Python's collector look everywhere, which takes a good part of a second. ``forget``
        lets go of what is held for recipes that nobody needs, or could do without before a refusal.
        ``give_back`` lets go of what only keeps memory in order, and says how many bytes that was."""
        self.device = device
        self.store = store
        self.slots = slots
        self.sizes = sizes
        self.budget_bytes = budget_bytes
        self.refusals = Refusals(device, sizes)
        self._collect = collect
        self._forget = forget
        self._give_back = give_back
        self._steps = 0
        self._collect_from = 0  # the step
        self._fruitless = 0  # collections, the last ones
        self.reclaims = 0  # times that room had to be made at once
        self.single_reclaims = 0  # of these, those for which one value left
        self.full_reclaims = 0  # those that had everything leave that could
        self.reclaimed_bytes = 0
        self.retries = 0  # ops that failed and were run again
        self.ooms = 0  # failed allocations that have been dealt with

    def begin_step(self) -> None:
        """Another micro-step begins."""
        self._steps += 1

    # -- making room -------------------------------------------------------------------------

    def reclaim(self, want_bytes: int, operands: Operands | None = None) -> int:
        """Free at least ``want_bytes`` on the device if it can be done; returns what was freed.

        What only kept memory in order goes first. Where there is any that is all, and may be less: whoever
        asked tries, and asks again. ``operands`` are the arguments of the op that room is made for, which
        stay in any case.
        """
        given_back_bytes = self._give_back()
        if given_back_bytes and want_bytes < EVERYTHING_BYTES:
            return given_back_bytes
        freed, left, full = self._send_away(want_bytes, operands)
        if not freed and self._steps >= self._collect_from:
            freed, left, full = self._send_what_garbage_held(want_bytes, operands, refusing=False)
        if not freed and full is not None:
            try:
                raise full
            finally:
                full = None  # a frame that holds its own exception keeps all that the frames above it hold
        if freed:
            self.reclaims += 1
            self.single_reclaims += left == 1
            self.full_reclaims += freed < want_bytes
            self.reclaimed_bytes += freed
        return freed + given_back_bytes

    def _send_away(
        self, want_bytes: int, operands: Operands | None
    ) -> tuple[int, int, HostBudgetTooSmall | SpillError | None]:
        """Have values leave until ``want_bytes`` are free: the bytes, how many values, and what was in the
        way of one."""
        freed = left = 0
        full: HostBudgetTooSmall | SpillError | None = None
        for slot in self._victims(operands):
            if freed >= want_bytes:
                break
            try:
                freed_here = self._evict(slot)
            except (HostBudgetTooSmall, SpillError) as error:
                full = error.with_traceback(None)  # another one may still find a place
                continue
            freed += freed_here
            left += freed_here > 0
        return freed, left, full

    def _send_what_garbage_held(
        self, want_bytes: int, operands: Operands | None, *, refusing: bool
    ) -> tuple[int, int, HostBudgetTooSmall | SpillError | None]:
        """The last that can be done: tensors in cycles that nobody holds any more may have been among what
        the collector passed by, and values that only these held may leave from now on. Once in a step at
        most, and more and more seldom while that finds nothing; but always before an op, or a value that it
        needs, is refused."""
        before_bytes = self.device.allocated_bytes()
        self._forget(refusing)
        self._collect()
        found = max(0, before_bytes - self.device.allocated_bytes())
        freed, left, full = self._send_away(want_bytes - found, operands)
        self._fruitless = 0 if found + freed else self._fruitless + 1
        self._collect_from = self._steps + (1 << self._fruitless)
        return found + freed, left, full

    def _at_last(self, want_bytes: int, operands: Operands | None) -> bool:
        """Whether anything could be freed after all, before a refusal."""
        freed, _, _ = self._send_what_garbage_held(want_bytes, operands, refusing=True)
        self.reclaims += freed > 0
        self.reclaimed_bytes += freed
        return freed > 0

    def reserve(
        self, blocks: tuple[int, ...], operands: Operands | None = None, *, refusing: bool = False
    ) -> bool:
        """Make sure that ``blocks`` find room together, and will for an op that asks for the same ones next,
        by evicting. Gives way (False) once nothing helps: the op may still find another way. If it has none,
        and would be ``refusing``, the last that can be done is done as well.

        [Note: Twice in the same place]
        Where room for one block had to be mapped there is another hole from then on, and whoever asks again
        may get another place for the block before it, so that the next one has none. That there was room is
        therefore shown only when the same blocks have found the same places twice in a row: the second time
        they all lay in memory that was mapped already, so that nothing has changed for the third. (If no
        other thread allocates meanwhile.) Blocks that always find room, but never settle, have to do: that
        was seen once in 44,000 layouts on a model of the allocator.
        """
        tidied = False
        while (size_bytes := self._finds_no_room(blocks)) is not None:
            want_bytes = max(size_bytes, _ROUND_BYTES)
            if self._evicted_for(want_bytes, operands):
                continue
            if not tidied:  # what lies well in one order of things may not in another
                tidied = True
                self.device.held_bytes()
            elif not (refusing and self._at_last(want_bytes, operands)):
                return False
        return True

    def _finds_no_room(self, blocks: tuple[int, ...]) -> int | None:
        """The size of the first of ``blocks`` that finds no room beside those before it, 0 if the allocator
        does not say; None if they all find it."""
        device = self.device.torch_device
        places: list[int] = []
        for _ in range(_MOST_PASSES):
            before = places
            try:
                held = [unwritten(size, device) for size in blocks if size]
            except torch.OutOfMemoryError as error:
                self.ooms += 1
                return asked_bytes(error)
            places = [block.data_ptr() for block in held]
            del held
            if places == before or len(places) == 1:
                break
        return None

    def _evicted_for(self, want_bytes: int, operands: Operands | None) -> bool:
        try:
            return self.reclaim(want_bytes, operands) > 0
        except (HostBudgetTooSmall, SpillError):
            return False

    def enter_in_ledger(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: Callable[[], str]
    ) -> None:
        """CPU: make room in the ledger for what ``func`` is going to return, before it runs."""
        need_bytes = sum(self.sizes.of(func, args, kwargs))
        if not need_bytes or self.fit(need_bytes, (args, kwargs)):
            return
        if not (self._at_last(need_bytes, (args, kwargs)) and self.fit(need_bytes, (args, kwargs))):
            raise self.refusals.op(func, args, kwargs, where(), need_bytes, self.budget_bytes)

    def fit(self, need_bytes: int, operands: Operands | None = None) -> bool:
        """CPU: whether ``need_bytes`` more fit under the budget, after evicting what must go."""
        while True:
            over_bytes = self.device.allocated_bytes() + need_bytes - self.budget_bytes
            if over_bytes <= 0 or not self.reclaim(over_bytes, operands):
                return over_bytes <= 0

    def allocate(
        self, size_bytes: int, operands: Operands | None = None, *, early: bool = False
    ) -> torch.Tensor:
        """Device memory for a value that comes back, for an op with ``operands`` if it is known. ``early``:
        it may just as well come later, and a refusal is cheap."""
        if not self.device.is_cuda:
            if not self.fit(size_bytes, operands):
                found = not early and self._at_last(size_bytes, operands)
                if not (found and self.fit(size_bytes, operands)):
                    raise self.refusals.way_back(size_bytes, operands is not None, self.budget_bytes)
            return new_bytes(size_bytes, self.device.torch_device)
        while True:
            try:
                return new_bytes(size_bytes, self.device.torch_device)
            except torch.OutOfMemoryError:
                self.ooms += 1  # the exception holds frames and those hold tensors: let go of it first
            if self.reclaim(max(size_bytes, _ROUND_BYTES), operands):
                continue
            if early or not self._at_last(size_bytes, operands):
                raise self.refusals.way_back(size_bytes, operands is not None, self.budget_bytes)

    def _victims(self, operands: Operands | None) -> Iterator[Slot]:
        """What is already on its way out, then what came back early, then large values, then all the
        rest; oldest first, which backward needs last. Then what only recipes will read, and what the
        program holds at the very end."""
        living = list(self.slots.living())
        yield from (slot for slot in living if slot.where is Where.HELD and slot.place is not None)
        yield from (slot for slot in living if slot.where is Where.COMING)
        for large in (True, False):
            for slot in living:
                if slot.place is None and (slot.size_bytes >= _SMALL_BYTES) is large and slot.alone():
                    yield slot
        yield from (slot for slot in list(self.slots.spare()) if slot.alone())
        held = [slot for slot in living if self.slots.may_lend(slot)] if operands is not None else []
        if operands is not None and held and all_plain(*operands):
            needed = {tensor.untyped_storage()._cdata for tensor in tensors_in(*operands)}
            yield from (slot for slot in held if slot.lendable() and slot.storage()._cdata not in needed)

    def _evict(self, slot: Slot) -> int:
        if slot.where is Where.COMING:
            return slot.size_bytes if slot.turn_back() else 0
        if slot.place is None:
            if not slot.alone():
                if not slot.lendable():
                    return 0
                slot.lend()
            slot.send(self.store.place(slot.size_bytes))
        slot.release()
        return slot.size_bytes if slot.where is Where.AWAY else 0

    # -- retrying ----------------------------------------------------------------------------

    def retry(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        where: Callable[[], str],
        want_bytes: int,
        begin_again: Callable[[], None] | None = None,
    ) -> Any:
        """Run ``func`` again, each time after evicting more; BudgetTooSmall when nothing is left.

        ``begin_again`` is called before each: it undoes what the last one changed (a generator's offset)."""
        want_bytes = max(want_bytes, _ROUND_BYTES)
        while self.reclaim(want_bytes, (args, kwargs)) or self._at_last(want_bytes, (args, kwargs)):
            self.retries += 1
            if begin_again is not None:
                begin_again()
            try:
                return func(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                self.ooms += 1
                want_bytes = max(2 * want_bytes, asked_bytes(error))
            except RuntimeError as error:
                if not starved_engine(error):
                    raise
                want_bytes *= 2
        raise self.refusals.op(func, args, kwargs, where(), want_bytes, self.budget_bytes)


def asked_bytes(error: BaseException) -> int:
    """How much the failed allocation asked for, from the allocator's own words; 0 if it does not say."""
    match = _ASKED.search(str(error))
    return int(float(match[1]) * _UNITS[match[2]]) + 1 if match else 0


def starved_engine(error: BaseException) -> bool:
    """Whether this is cuDNN's way to say that no algorithm fits into memory."""
    text = str(error).lower()
    return "unable to find an engine" in text or "cudnn_status_alloc_failed" in text
