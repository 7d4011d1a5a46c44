"""Holes: opens them where the caching allocator would otherwise stop the device.

[Note: Pinches]
Under a cap, free memory lies in holes between blocks. An allocation that fits into none of them makes
the allocator wait for the device, unmap every free page and map as many again elsewhere: milliseconds
during which neither ops nor, often, copies run. But values that stay are ours to move, and a copy
within the device is quick and waits for nothing. The pinches of a program are the ops before which that
happened. They are learned in the first steps under a plan, since steps repeat, and from then on a hole
is opened there by moving what stands around it. Where that does not help, what stood in the way (results
in use just then) is put elsewhere when it is made.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from torchlms.eager import private
from torchlms.eager.tensors import new_bytes
from torchlms.memory.compaction import Block, Window, find_window, first_misfit
from torchlms.memory.device import CudaDevice

if TYPE_CHECKING:
    from torchlms.eager.ladder import Population
    from torchlms.eager.program import Program
    from torchlms.eager.slot import Slot
    from torchlms.memory.device import CpuDevice

Mapped = list[list[Block]]

_LEAST_BYTES = 20 << 20  # smaller allocations hardly ever fail for want of a hole
_GRAIN_BYTES = 2 << 20  # what the allocator rounds to is less
_MOST_ROUNDS = 3
_MOST_TRIES = 8
_SPARE_BYTES = 12 << 20  # beside a page, left unmapped for pools that may still grow a little


class Holes:
    """Learns the pinches of each program, and opens holes at them."""

    def __init__(self, device: CudaDevice | CpuDevice, slots: Population) -> None:
        self._device = device
        self._slots = slots
        self._program: Program | None = None
        self._remaps = 0
        self._began = 0
        self._pinched: set[int] = set()
        self._filler: torch.Tensor | None = None
        self.ooms = 0  # allocations that failed here, which does no harm
        self.opened = 0  # holes opened by moving values
        self.moved_bytes = 0

    # -- learning ----------------------------------------------------------------------------

    @property
    def learning(self) -> bool:
        return self._program is not None and self._program.lessons > 0

    def begin_step(self, program: Program | None) -> None:
        """A micro-step begins, under ``program`` if there is one."""
        self._program = program if isinstance(self._device, CudaDevice) else None
        self._pinched = set()
        if self._program is not None:
            if self._program.lessons and self._program.scattered:
                self._level()
                self._program.scattered = False
            self._remaps = self._began = self._count()

    def note(self, op: int) -> None:
        """Ask, after op ``op`` or after what was done before it, whether the allocator had to remap."""
        remaps = self._count()
        if remaps != self._remaps:
            self._remaps = remaps
            self._pinched.add(op)

    def end_step(self) -> None:
        """The micro-step is over: what was learned counts from the next one on."""
        self.untuck()
        program, self._program = self._program, None
        if program is not None:
            program.learn(self._pinched, disturbed=self._count() != self._began)

    def _count(self) -> int:
        return private.allocator_remaps(self._device.torch_device)

    def _level(self) -> None:
        """Between steps, when little is in use: map all free memory in one piece."""
        device = self._device
        assert isinstance(device, CudaDevice)
        if not private.expandable_segments():
            return
        elsewhere_bytes = self._elsewhere_bytes()
        torch.cuda.empty_cache()
        given_back_bytes = elsewhere_bytes - self._elsewhere_bytes()  # and soon wanted again
        room_bytes = device.cap_bytes - torch.cuda.memory_reserved(device.torch_device) - given_back_bytes
        spare_bytes = device.page_bytes + _SPARE_BYTES
        if room_bytes > 2 * spare_bytes:
            self._try_empty(room_bytes - spare_bytes)

    def _elsewhere_bytes(self) -> int:
        """What other pools than that of large blocks on this stream have reserved."""
        device = self._device.torch_device
        ours = sum(block.size_bytes for run in self._mapped() for block in run)
        return torch.cuda.memory_reserved(device) - ours

    # -- opening -----------------------------------------------------------------------------

    def open(self, sizes_bytes: Sequence[int]) -> None:
        """See to it that blocks of ``sizes_bytes`` can be allocated, in this order, without remapping.

        Does what it can: where no window can be freed the allocator remaps, as it would have.
        """
        large = [size for size in sizes_bytes if size >= _LEAST_BYTES]
        if not large or not isinstance(self._device, CudaDevice):
            return
        for _ in range(_MOST_ROUNDS):  # a hole made for one block may change where another goes
            mapped = self._mapped()
            misfit = first_misfit(mapped, large)
            if misfit is None or not self._open_for(large, misfit, mapped):
                return

    def _open_for(self, sizes_bytes: Sequence[int], misfit: int, mapped: Mapped) -> bool:
        """Make a hole for the block that found none; False if that cannot be done."""
        if self._open_one(sizes_bytes[misfit], mapped):
            return True
        # There was a hole, but one of the blocks before it takes that: let them have it.
        held = [self._try_empty(size_bytes) for size_bytes in sizes_bytes[:misfit]]
        opened = None not in held and self._open_one(sizes_bytes[misfit], self._mapped())
        del held
        return opened

    def tuck(self, sizes_bytes: Sequence[int]) -> None:
        """Have the allocations that follow go to the far end of the largest hole, until ``untuck``.

        New blocks go to the near end of a hole, next to what stays long: there they would later stand
        in the middle of the room that opens as that leaves.
        """
        self.untuck()
        if not isinstance(self._device, CudaDevice):
            return
        wanted_bytes = sum(
            -(-size // _GRAIN_BYTES) * _GRAIN_BYTES for size in sizes_bytes if size >= _LEAST_BYTES
        )
        hole_bytes = max(
            (block.size_bytes for run in self._mapped() for block in run if block.free), default=0
        )
        if wanted_bytes and hole_bytes - wanted_bytes >= _LEAST_BYTES:
            self._filler = self._try_empty(hole_bytes - wanted_bytes)

    def untuck(self) -> int:
        """Returns how many bytes that gives back."""
        given_back_bytes = self._filler.nbytes if self._filler is not None else 0
        self._filler = None
        return given_back_bytes

    def _open_one(self, size_bytes: int, mapped: Mapped) -> bool:
        """Whether a hole of ``size_bytes`` has been made by moving something of what is ``mapped``."""
        movable = {
            slot.bytes.data_ptr(): slot
            for slot in self._slots.living()
            if slot.bytes is not None and slot.at_rest()
        }
        window = find_window(_marked(mapped, movable), size_bytes)
        return window is not None and bool(window.moves) and self._clear(window, movable)

    def _mapped(self) -> Mapped:
        """What the allocator has mapped now. To ask takes a millisecond or two, in which the device may run
        out of work."""
        return private.mapped_runs(self._device.torch_device)

    def _clear(self, window: Window, movable: dict[int, Slot]) -> bool:
        """Move all that stands in ``window``; False if it could not all be done."""
        fillers: list[torch.Tensor] = []  # of holes inside the window, which the allocator would take first
        for block in window.moves:
            target = self._outside(window, movable[block.address].size_bytes, fillers)
            if target is None:
                return False
            movable[block.address].move_to(target)
            self.moved_bytes += block.size_bytes
        self.opened += 1
        return True

    def _outside(self, window: Window, size_bytes: int, fillers: list[torch.Tensor]) -> torch.Tensor | None:
        for _ in range(_MOST_TRIES):
            target = self._try_empty(size_bytes)
            if target is None:
                return None
            if not window.contains(target.data_ptr()):
                return target
            fillers.append(target)
        return None

    def _try_empty(self, size_bytes: int) -> torch.Tensor | None:
        try:
            return self._empty(size_bytes)
        except torch.OutOfMemoryError:
            self.ooms += 1
            return None

    def _empty(self, size_bytes: int) -> torch.Tensor:
        return new_bytes(size_bytes, self._device.torch_device)


def _marked(mapped: Mapped, movable: Container[int]) -> Mapped:
    """The same blocks, those that may be moved told as such."""
    return [
        [replace(block, movable=True) if block.address in movable else block for block in run]
        for run in mapped
    ]
