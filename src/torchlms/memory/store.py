"""Store: places off the device, and the copies to and from them.

A ``Place`` is somewhere bytes can wait: a region of a planned arena, of an unplanned slab, or of
the spill file. Copies out run in order on one queue, copies back on another; a copy back starts
only after the copy out of the same bytes has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from torchlms.errors import HostBudgetTooSmall, SpillError
from torchlms.memory.arena import Arena
from torchlms.memory.device import Copy, CpuDevice, CudaCopy, CudaDevice, FutureCopy, afresh
from torchlms.memory.disk import SpillFile
from torchlms.memory.limits import disk_free_bytes, format_bytes
from torchlms.memory.spill_place import directory_for, remove_stale
from torchlms.uninterrupted import uninterrupted

SLAB_BYTES = 1 << 30
_SPARE = 1.05
_WORKERS = "torchlms-"


class Place:
    """Bytes waiting off the device. Freed once, by ``free``; safe to free twice."""

    __slots__ = ("_release", "arena", "busy", "offset_bytes", "size_bytes", "tier")

    def __init__(
        self, tier: str, offset_bytes: int, size_bytes: int, arena: Arena | None, release: Callable[[], None]
    ) -> None:
        self.tier = tier
        self.offset_bytes = offset_bytes
        self.size_bytes = size_bytes
        self.arena = arena
        self.busy: Future[Any] | None = None  # a thread that still writes here
        self._release: Callable[[], None] | None = release

    def free(self) -> None:
        release, self._release = self._release, None
        if release is None:
            return
        if self.busy is not None:
            self.busy.add_done_callback(lambda _: release())  # at once, if it is done
        else:
            release()


class Store:
    """Host memory and disk under their budgets, for one device.

    ``planned`` is the arena of the current plan (pinned, exact); ``slabs`` hold what leaves
    without a plan (pageable, made as needed). On the CPU there is no host tier, only the file.
    """

    def __init__(
        self,
        device: CudaDevice | CpuDevice,
        *,
        host_budget_bytes: int,
        disk_budget_bytes: int,
        disk_dir: str | os.PathLike[str] | None,
    ) -> None:
        self.device = device
        self.host_budget_bytes = host_budget_bytes
        self.disk_budget_bytes = disk_budget_bytes
        self.disk_dir = disk_dir
        self.planned: Arena | None = None
        # Pageable on purpose: a copy of theirs has ended when the call returns, so that a region just
        # freed may be filled by a thread (staging), which is in no stream's order.
        self.slabs: list[Arena] = []
        self.retired: list[Arena] = []  # planned once, and still lived in
        self.spill: SpillFile | None = None
        self.peak_host_bytes = 0
        self.bytes_out = 0
        self.bytes_in = 0
        self.disk_bytes = 0
        self.host_refusals = 0  # times that host memory within the budget was not to be had
        self.overflows = 0  # values that went to disk because host memory was full
        self.closed = False
        with contextlib.suppress(OSError):
            remove_stale(directory_for(disk_dir))
        self._slabs_lock = threading.Lock()  # workers stage in slabs, too
        self._workers: ThreadPoolExecutor | None = None
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._last_in: torch.cuda.Event | None = None

    # -- places ------------------------------------------------------------------------------

    def plan_arena(self, size_bytes: int) -> None:
        """Have a planned arena of ``size_bytes``; one that is hardly larger is kept, since pinning
        takes time. An old one in which something still lives is kept until that has left. Where host
        memory refuses (HostBudgetTooSmall) there is none, and what was to go there finds other places."""
        if self.planned is not None and size_bytes <= self.planned.capacity_bytes <= _SPARE * size_bytes:
            self.close_empty_slabs()
            return
        if self.planned is not None:
            self.retired.append(self.planned)
            self.planned = None
        self.close_empty_slabs()
        if size_bytes and self.device.is_cuda:
            try:
                self.planned = Arena(size_bytes, pinned=True)
            except HostBudgetTooSmall:
                self.host_refusals += 1
                raise
        self._note_host_peak()

    def place_planned(self, offset_bytes: int, size_bytes: int) -> Place | None:
        """The planned region at ``offset_bytes``, or None while something else still lives there."""
        arena = self.planned
        if arena is None or arena.closed or not arena.reserve(offset_bytes, size_bytes):
            return None
        return Place("host", offset_bytes, size_bytes, arena, lambda: arena.free(offset_bytes))

    def place(self, size_bytes: int) -> Place:
        """Anywhere off the device: host memory first, then disk; HostBudgetTooSmall when neither holds it."""
        if self.device.is_cuda:
            found = self._place_in_slabs(size_bytes)
            if found is not None:
                return found
            self.overflows += 1
        return self.place_on_disk(size_bytes)

    def place_on_disk(self, size_bytes: int) -> Place:
        spill = self._open_spill()
        offset_bytes = spill.allocate(size_bytes)
        if offset_bytes is None:
            host = (
                f"host memory ({format_bytes(self.host_bytes())} of {format_bytes(self.host_budget_bytes)} "
                "in use) and "
                if self.device.is_cuda
                else ""
            )
            only = "" if self.device.is_cuda else " (host_budget is for GPUs)"
            free = f"{format_bytes(disk_free_bytes(spill.directory))} free"
            if spill.stopped_by:
                free += f"; the spill file cannot grow: {spill.stopped_by}"
            missing_bytes = size_bytes - spill.left_bytes
            raise HostBudgetTooSmall(
                f"{format_bytes(size_bytes)} more must leave {self.device.torch_device}, but {host}disk "
                f"({format_bytes(spill.left_bytes)} left of {format_bytes(self.disk_budget_bytes)}, {free}) "
                f"cannot hold them{only}. More may have to leave later in the step: raise "
                f"{'host_budget or ' if host else ''}disk_budget, free disk space, or use a smaller batch",
                # There may be room, but in pieces, or none on the disk itself.
                missing_bytes=missing_bytes if missing_bytes > 0 else size_bytes,
            )
        return Place("disk", offset_bytes, size_bytes, None, lambda: spill.free(offset_bytes))

    def host_bytes(self) -> int:
        return self.planned_bytes() + sum(arena.capacity_bytes for arena in (*self.slabs, *self.retired))

    def planned_bytes(self) -> int:
        """Bytes of the pinned arena."""
        return self.planned.capacity_bytes if self.planned is not None else 0

    def close_empty_slabs(self) -> None:
        """Give unplanned host memory back; slabs that still hold something stay."""
        empty = [arena for arena in (*self.slabs, *self.retired) if arena.in_use_bytes == 0]
        if not empty:
            return
        self.device.synchronize()  # a region is freed when its copy is queued, not when it ends
        with self._slabs_lock:  # meanwhile a worker may have come to use one
            for arena in [arena for arena in empty if arena.in_use_bytes == 0]:
                arena.close()
                (self.slabs if arena in self.slabs else self.retired).remove(arena)

    def _place_in_slabs(self, size_bytes: int) -> Place | None:
        with self._slabs_lock:
            return self._place_in_slabs_alone(size_bytes)

    def _place_in_slabs_alone(self, size_bytes: int) -> Place | None:
        for slab in self.slabs:
            offset_bytes = slab.allocate(size_bytes)
            if offset_bytes is not None:
                return _region(slab, offset_bytes, size_bytes)
        room_bytes = self.host_budget_bytes - self.host_bytes()
        slab_bytes = min(max(SLAB_BYTES, size_bytes), room_bytes)
        if slab_bytes < size_bytes:
            return None
        try:
            slab = Arena(slab_bytes, pinned=False)
        except HostBudgetTooSmall:
            self.host_refusals += 1
            return None
        slab.touch()
        self.slabs.append(slab)
        self._note_host_peak()
        offset_bytes = slab.allocate(size_bytes)
        return None if offset_bytes is None else _region(slab, offset_bytes, size_bytes)

    def _note_host_peak(self) -> None:
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes())

    def _open_spill(self) -> SpillFile:
        self._require_open()
        if self.spill is None:
            with uninterrupted():  # else its descriptors may be nobody's
                self.spill = SpillFile(self.disk_dir, self.disk_budget_bytes)
        return self.spill

    def _require_open(self) -> None:
        if self.closed:
            raise SpillError(errno.EBADF, "LMS has ended, and with it what waited off the device")

    # -- copies ------------------------------------------------------------------------------

    def copy_out(self, source: torch.Tensor, place: Place) -> Copy:
        """Start copying ``source`` (uint8, on the device) to ``place``, after the work queued so far."""
        self.bytes_out += place.size_bytes
        if not isinstance(self.device, CudaDevice):
            self.disk_bytes += place.size_bytes
            place.busy = self._open_spill().write(place.offset_bytes, source)
            return FutureCopy(place.busy)
        if place.arena is not None:
            return self._device_to_host(source, _view(place))
        self.disk_bytes += place.size_bytes
        staging = self._staging(place.size_bytes)
        leaving = self._device_to_host(source, _view(staging))
        place.busy = self._pool().submit(self._write_behind, leaving, staging, place.offset_bytes)
        return _Leaving(leaving, place.busy)

    def copy_in(self, place: Place, target: torch.Tensor, after: Copy | None) -> Copy:
        """Start copying ``place`` to ``target`` (uint8, on the device); ``after`` is its copy out."""
        self.bytes_in += place.size_bytes
        if not isinstance(self.device, CudaDevice):
            # The pool keeps its arguments for a moment after it is done: in a box that is emptied by then.
            place.busy = self._pool().submit(self._read_cpu, place, [target], after)
            return FutureCopy(place.busy)
        if place.arena is not None:
            return self._host_to_device(_view(place), target, after)
        ready = torch.cuda.Event()
        # The target's memory belongs to earlier work until here.
        ready.record(torch.cuda.current_stream(self.device.torch_device))
        return FutureCopy(self._pool().submit(self._read_ahead, place, [target], after, ready))

    def _device_to_host(self, source: torch.Tensor, target: torch.Tensor) -> CudaCopy:
        out_stream, _ = self._open_streams()
        out_stream.wait_stream(torch.cuda.current_stream(self.device.torch_device))
        if self._last_in is not None:
            out_stream.wait_event(self._last_in)  # a region may be rewritten only after it was read
        with torch.cuda.stream(out_stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return CudaCopy(event, self.device.torch_device)

    def _host_to_device(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        after: Copy | None,
        ready: torch.cuda.Event | None = None,
    ) -> CudaCopy:
        _, in_stream = self._open_streams()
        if ready is not None:
            in_stream.wait_event(ready)
        else:
            in_stream.wait_stream(torch.cuda.current_stream(self.device.torch_device))
        if isinstance(after, CudaCopy):
            in_stream.wait_event(after.event)
        with torch.cuda.stream(in_stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._last_in = event
        return CudaCopy(event, self.device.torch_device)

    def _write_behind(self, leaving: CudaCopy, staging: Place, offset_bytes: int) -> None:
        try:
            leaving.event.synchronize()
            self._open_spill().write(offset_bytes, _view(staging)).result()
        finally:
            staging.free()

    def _read_ahead(
        self, place: Place, target: list[torch.Tensor], after: Copy | None, ready: torch.cuda.Event
    ) -> CudaCopy:
        bytes_wanted = target.pop()
        if isinstance(after, _Leaving):
            after.written.result()
        staging = self._staging(place.size_bytes)
        try:
            self._open_spill().read(place.offset_bytes, _view(staging)).result()
            copy = self._host_to_device(_view(staging), bytes_wanted, None, ready)
            copy.event.synchronize()
            return copy
        finally:
            staging.free()

    def _read_cpu(self, place: Place, target: list[torch.Tensor], after: Copy | None) -> None:
        bytes_wanted = target.pop()
        if after is not None:
            after.wait()
        self._open_spill().read(place.offset_bytes, bytes_wanted).result()

    def _staging(self, size_bytes: int) -> Place:
        """Host memory a value passes through between device and disk; beyond the budget if it must be."""
        found = self._place_in_slabs(size_bytes)
        if found is not None:
            return found
        arena = Arena(size_bytes, pinned=False)
        return Place("host", 0, size_bytes, arena, arena.close)

    def finish(self) -> None:
        """Wait for every copy that was started."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.shutdown(wait=True)
        self.device.synchronize()

    def _pool(self) -> ThreadPoolExecutor:
        self._require_open()
        if self._workers is None:
            self._workers = ThreadPoolExecutor(2, thread_name_prefix=f"{_WORKERS}store")
        return self._workers

    def _open_streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if self._streams is None:
            device = self.device.torch_device
            self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        return self._streams

    def close(self) -> None:
        """Wait for what is in flight and give everything back; idempotent."""
        if self._workers is not None:
            self._workers.shutdown(wait=True)
            self._workers = None
        self.closed = True
        if self._streams is not None:
            self.device.synchronize()
            self._streams = None
        if self.planned is not None:
            self.planned.close()
            self.planned = None
        for arena in (*self.slabs, *self.retired):
            arena.close()
        self.slabs.clear()
        self.retired.clear()
        if self.spill is not None:
            self.spill.close()
            self.spill = None


class _Leaving:
    """Device to host to disk: the device bytes are free after the first half."""

    __slots__ = ("first", "written")

    def __init__(self, first: CudaCopy, written: Future[Any]) -> None:
        self.first = first
        self.written = written

    def wait(self) -> None:
        error = self.written.exception() if self.written.done() else None
        if error is not None:  # a failed write must not pass unnoticed
            raise afresh(error)
        self.first.wait()

    def done(self) -> bool:
        return self.first.done()


def _region(arena: Arena, offset_bytes: int, size_bytes: int) -> Place:
    return Place("host", offset_bytes, size_bytes, arena, lambda: arena.free(offset_bytes))


def _view(place: Place) -> torch.Tensor:
    assert place.arena is not None
    return place.arena.view(place.offset_bytes, place.size_bytes)
