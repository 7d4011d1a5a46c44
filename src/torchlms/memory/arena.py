"""Arena: one mapping of host memory, pinned in one go, that tensors are carved from."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

import torch

from torchlms.errors import HostBudgetTooSmall
from torchlms.memory.freelist import FreeList
from torchlms.memory.limits import format_bytes, host_available_bytes, memlock_limit_bytes

HUGE_PAGE_BYTES = 2 << 20
ALIGNMENT_BYTES = 512  # what the CUDA caching allocator gives; CPU kernels change bits below it

_TOUCH_CHUNK_BYTES = 64 << 20
_TOUCH_THREADS = 16
# Linux numbers that Python's mmap module lacks in some of the versions we run on.
_MAP_NORESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64", "riscv64") else 0
_MADV_DONTNEED, _MADV_DONTFORK, _MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 4, 10, 14, 23
_CUDA_HOST_REGISTER_PORTABLE = 1  # pinned for every device's context, not only the current one
_CUDA_SUCCESS = 0

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_Mapping: TypeAlias = "ctypes.Array[ctypes.c_uint8]"

_registered: dict[int, int] = {}  # address -> bytes pinned by arenas of this process
os.register_at_fork(after_in_child=_registered.clear)


class Registrar(Protocol):
    """Pins and unpins a range of host memory; each verb returns 0 or the driver's error number."""

    def available(self) -> bool: ...
    def register(self, address: int, size_bytes: int) -> int: ...
    def unregister(self, address: int) -> int: ...


class CudaRegistrar:
    """``cudaHostRegister`` and its opposite, on the device that is current when the arena is made."""

    def __init__(self) -> None:
        self._device = 0

    def available(self) -> bool:
        return torch.cuda.is_available()

    def register(self, address: int, size_bytes: int) -> int:
        self._device = torch.cuda.current_device()
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(cudart.cudaHostRegister(address, size_bytes, _CUDA_HOST_REGISTER_PORTABLE))
        if code != _CUDA_SUCCESS:
            self._clear_last_error()
        return code

    def unregister(self, address: int) -> int:
        # A copy may still be reading or writing the range; the driver would fail it.
        torch.cuda.synchronize(self._device)
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(cudart.cudaHostUnregister(address))
        if code != _CUDA_SUCCESS:
            self._clear_last_error()
        return code

    def _clear_last_error(self) -> None:
        # CUDA remembers the failure, and torch would raise it at the next, innocent kernel launch.
        # torch binds no cudaGetLastError; a launch whose error we drop does the same.
        try:
            torch.empty(1, device=f"cuda:{self._device}").fill_(0)
        except RuntimeError:
            _log.debug("dropped the stale CUDA error", exc_info=True)


def pinned_bytes_in_use() -> int:
    """Host bytes that arenas of this process hold pinned right now; 0 once all of them are closed."""
    return sum(_registered.values())


class Arena:
    """``capacity_bytes`` of host memory in one private anonymous mapping.

    A pinned arena takes all its pages at once, in parallel, and registers them with the driver. If
    the driver refuses, the arena is pageable: ``pinned`` is False and one warning says why. An arena
    that is not pinned takes pages as they are first written, so a generous capacity costs nothing.
    ``touch_s`` and ``register_s`` are what the two steps took.

    ``view`` tensors keep the mapping alive: ``close`` unpins at once, but the memory itself goes
    back when the last view dies, and views stay readable until then. A forked child does not have
    the memory (MADV_DONTFORK: a child's copy of a page the device writes to would be torn), so it
    must not touch views made before the fork.

    ``allocate``, ``reserve`` and ``free`` may be called from any thread, ``free`` also from a finalizer.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        pinned: bool,
        alignment_bytes: int = ALIGNMENT_BYTES,
        registrar: Registrar | None = None,
    ) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"an arena of {capacity_bytes} bytes holds nothing")
        page_bytes = HUGE_PAGE_BYTES if capacity_bytes >= HUGE_PAGE_BYTES else mmap.PAGESIZE
        self.capacity_bytes = -(-capacity_bytes // page_bytes) * page_bytes
        self.pinned = False
        self.touch_s = 0.0
        self.register_s = 0.0
        self._pid = os.getpid()
        self._blocks = FreeList(self.capacity_bytes, alignment_bytes)
        registrar = registrar or CudaRegistrar()
        pin = pinned and _may_pin(self.capacity_bytes, registrar)
        mapping = _map(self.capacity_bytes, reserve=pin)
        self._mapping: _Mapping | None = mapping
        if pin:
            self._pin(mapping, registrar)

    @property
    def closed(self) -> bool:
        return self._mapping is None

    @property
    def in_use_bytes(self) -> int:
        return self._blocks.in_use_bytes

    @property
    def peak_bytes(self) -> int:
        return self._blocks.peak_bytes

    def view(self, offset: int, size_bytes: int) -> torch.Tensor:
        """The bytes at ``offset`` as a uint8 tensor: no copy, with a storage and version counter of its own.

        Any range inside the arena will do; it need not have been allocated.
        """
        mapping = self._require_open()
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.capacity_bytes:
            raise ValueError(
                f"[{offset}, {offset + size_bytes}) is outside an arena of {self.capacity_bytes}"
            )
        if size_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mapping, dtype=torch.uint8, offset=offset, count=size_bytes)

    def allocate(self, size_bytes: int) -> int | None:
        """The offset of ``size_bytes`` nobody else has, or None when no gap is wide enough."""
        self._require_open()
        return self._blocks.allocate(size_bytes)

    def reserve(self, offset: int, size_bytes: int) -> bool:
        """Take a planned place, so that ``allocate`` keeps out of it; False when part of it is taken."""
        self._require_open()
        return self._blocks.reserve(offset, size_bytes)

    def free(self, offset: int) -> None:
        """Give back what ``allocate`` or ``reserve`` took at ``offset``. After ``close`` it does nothing."""
        if self._mapping is not None:
            self._blocks.free(offset)

    def touch(self) -> float:
        """Have every page backed by memory now; returns the seconds it took.

        For before the first use: where the kernel cannot populate (below 5.14) the bytes become zero.
        """
        return _touch(ctypes.addressof(self._require_open()), self.capacity_bytes)

    def close(self) -> None:
        """Unpin, and unmap as soon as no view is left. Idempotent; does nothing in a forked child."""
        mapping, self._mapping = self._mapping, None
        if self.pinned:
            self._unpin()
        self.pinned = False
        del mapping  # the pages outlive the pinning, never the other way round

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _pin(self, mapping: _Mapping, registrar: Registrar) -> None:
        address = ctypes.addressof(mapping)
        self.touch_s = _touch(address, self.capacity_bytes)
        begin_s = time.perf_counter()
        code = registrar.register(address, self.capacity_bytes)
        self.register_s = time.perf_counter() - begin_s
        if code != _CUDA_SUCCESS:
            # The pages were taken for nothing; hand them back until somebody writes to them.
            _libc.madvise(address, self.capacity_bytes, _MADV_DONTNEED)
            _warn_pageable(self.capacity_bytes, f"cudaHostRegister returned error {code}")
            return
        self.pinned = True
        _registered[address] = self.capacity_bytes
        # Also runs when the arena is collected without close, and at exit before the driver goes.
        # It holds the mapping: a collector that finds both dead must not unmap what is still pinned.
        self._unpin = weakref.finalize(self, _unregister, registrar, mapping, self._pid)

    def _require_open(self) -> _Mapping:
        if self._mapping is None:
            raise ValueError("the arena is closed")
        if os.getpid() != self._pid:
            raise RuntimeError("an arena belongs to the process that made it; this is a forked child")
        return self._mapping


def _may_pin(size_bytes: int, registrar: Registrar) -> bool:
    if not registrar.available():
        _warn_pageable(size_bytes, "no CUDA device is available")
        return False
    # Pinning takes every page at once: past the limit comes the OOM killer, not an error.
    missing_bytes = size_bytes - host_available_bytes()
    if missing_bytes > 0:
        raise HostBudgetTooSmall(
            f"cannot pin {format_bytes(size_bytes)} of host memory: {format_bytes(missing_bytes)} more than "
            "is available now (RAM, cgroup and address space limits considered); give a smaller host_budget",
            missing_bytes=missing_bytes,
        )
    return True


def _warn_pageable(size_bytes: int, reason: str) -> None:
    limit_bytes = memlock_limit_bytes()
    limit = "unlimited" if limit_bytes < 0 else format_bytes(limit_bytes)
    _log.warning(
        "%s of host memory stay pageable, copies to the device will be several times slower: %s "
        "(locked memory limit: %s)",
        format_bytes(size_bytes),
        reason,
        limit,
    )


def _map(size_bytes: int, *, reserve: bool) -> _Mapping:
    """A mapping as a ctypes array; unmapped when the array, which every view refers to, is collected."""
    aligned = size_bytes >= HUGE_PAGE_BYTES
    # The kernel gives huge pages only to aligned ranges: map one more, then trim both ends.
    slack_bytes = HUGE_PAGE_BYTES if aligned else 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0 if reserve else _MAP_NORESERVE)
    raw = _libc.mmap(None, size_bytes + slack_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if raw is None or raw == ctypes.c_void_p(-1).value:
        reason = os.strerror(ctypes.get_errno())
        raise HostBudgetTooSmall(
            f"cannot map {format_bytes(size_bytes)} of host memory: {reason}", missing_bytes=size_bytes
        )
    address = -(-raw // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES if aligned else raw
    if address > raw:
        _libc.munmap(raw, address - raw)
    if tail_bytes := raw + slack_bytes - address:
        _libc.munmap(address + size_bytes, tail_bytes)
    for advice in (_MADV_HUGEPAGE, _MADV_DONTFORK):  # advice: refused where unknown, and that is fine
        _libc.madvise(address, size_bytes, advice)
    mapping = (ctypes.c_uint8 * size_bytes).from_address(address)
    unmap = weakref.finalize(mapping, _unmap, address, size_bytes, os.getpid())
    unmap.atexit = False  # views may outlive everything; the kernel cleans up after us
    return mapping


def _unmap(address: int, size_bytes: int, pid: int) -> None:
    # In a forked child the range was never there, and may by now be somebody else's memory.
    if os.getpid() == pid:
        _libc.munmap(address, size_bytes)


def _unregister(registrar: Registrar, mapping: _Mapping, pid: int) -> None:
    if os.getpid() != pid:
        return
    address = ctypes.addressof(mapping)
    _registered.pop(address, None)
    try:
        code = registrar.unregister(address)
    except Exception:  # at exit the driver may be gone before us
        _log.debug("unpinning failed", exc_info=True)
    else:
        if code != _CUDA_SUCCESS:
            _log.debug("cudaHostUnregister returned error %d", code)


def _touch(address: int, size_bytes: int) -> float:
    """Fault in a range in parallel; one thread alone is held to a third of what pinning can take."""
    begin_s = time.perf_counter()
    starts = range(0, size_bytes, _TOUCH_CHUNK_BYTES)
    sizes = [min(_TOUCH_CHUNK_BYTES, size_bytes - start) for start in starts]
    threads = min(_TOUCH_THREADS, len(os.sched_getaffinity(0)), len(sizes))
    with ThreadPoolExecutor(threads, thread_name_prefix="torchlms-touch") as pool:
        list(pool.map(_touch_chunk, [address + start for start in starts], sizes))
    return time.perf_counter() - begin_s


def _touch_chunk(address: int, size_bytes: int) -> None:
    # Linux 5.14 populates without a second pass over the bytes; earlier kernels say EINVAL.
    # Both calls release the GIL.
    if _libc.madvise(address, size_bytes, _MADV_POPULATE_WRITE) != 0:
        ctypes.memset(address, 0, size_bytes)
