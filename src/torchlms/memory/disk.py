"""SpillFile: the disk tier, one file per process, written and read by threads past the page cache."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from torchlms.errors import SpillError
from torchlms.memory.freelist import FreeList
from torchlms.memory.limits import disk_free_bytes, format_bytes
from torchlms.memory.open_file import ALIGNMENT_BYTES, OpenFile, pread_into
from torchlms.memory.spill_place import FILE, directory_for, remove_stale

CHUNK_BYTES = 8 << 20

_RESERVE_STEP_BYTES = 256 << 20
_LEAVE_FREE = 0.05  # share of the free disk that a spill file without a budget leaves to others
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

_log = logging.getLogger(__name__)


class SpillFile:
    """Disk bytes at 4096-aligned offsets, within ``budget_bytes`` (None: what is free, less 5%).

    ``write`` and ``read`` return at once with a future that is done when the last byte has moved, or
    fails with SpillError once no thread uses the tensor any more; it cannot be cancelled. Until then the
    caller leaves the tensor's bytes alone. Overlapping work is the caller's to order: wait for the
    write's future, then read. Nothing is promised to survive a power cut.

    The file is ``<directory>/torchlms-<pid>-<random>/spill.bin``, beside a lock held as long as the
    process lives: however it ended, the next SpillFile in ``directory`` removes what it left. A forked
    child cannot use the file and does not remove it. ``directory=None`` is ``default_directory()``.

    ``direct`` says whether O_DIRECT is in use; where it is not, rates are partly the page cache's.
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None, budget_bytes: int | None, *, threads: int = 4
    ) -> None:
        directory = directory_for(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            remove_stale(directory)
            self._files = OpenFile(directory)
        except OSError as error:
            raise _spill_error(error, f"cannot spill to {directory}", "give another disk_dir") from error
        if budget_bytes is None:
            budget_bytes = int(disk_free_bytes(directory) * (1 - _LEAVE_FREE))
        self.directory = self._files.directory
        self.closed = False
        self.bytes_written = 0
        self.bytes_read = 0
        self._blocks = FreeList(budget_bytes, ALIGNMENT_BYTES)
        self._reserved_bytes = 0
        self._can_reserve = True
        self.stopped_by = ""  # why the file could not grow when it was to last; empty if it could
        self._told = ""  # of these reasons, the one that the log has
        self._lock = threading.RLock()  # a finalizer may come in on the thread that holds it
        self._in_flight: set[Future[None]] = set()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="torchlms-disk")
        self._bounce = _BouncePages()
        self._pid = os.getpid()
        # Also runs when it is collected without close, and at exit (after the pool has drained).
        self._remove = weakref.finalize(self, _remove, self._pool, self._files, self._pid)

    @property
    def direct(self) -> bool:
        return self._files.direct >= 0

    @property
    def budget_bytes(self) -> int:
        return self._blocks.capacity_bytes

    @property
    def in_use_bytes(self) -> int:
        return self._blocks.in_use_bytes

    @property
    def left_bytes(self) -> int:
        """Of the budget; perhaps in pieces."""
        return self._blocks.capacity_bytes - self._blocks.in_use_bytes

    @property
    def peak_bytes(self) -> int:
        return self._blocks.peak_bytes

    def allocate(self, size_bytes: int) -> int | None:
        """The offset of ``size_bytes`` on disk, truly reserved where the filesystem can do that.

        None when the budget has no gap wide enough, or the file cannot grow: ``stopped_by`` says why.
        """
        self._require_open()
        with self._lock:
            offset = self._blocks.allocate(size_bytes)
            self.stopped_by = ""
            if offset is not None and not self._reserve_to(offset + self._blocks.size_of(offset)):
                self._blocks.free(offset)
                return None
            return offset

    def free(self, offset: int) -> None:
        """Give back what ``allocate`` returned, no transfer on it in flight. After ``close`` does nothing."""
        if not self.closed:
            self._blocks.free(offset)

    def write(self, offset: int, tensor: torch.Tensor) -> Future[None]:
        """Start writing a contiguous uint8 CPU tensor at ``offset``."""
        return self._start(offset, tensor, write=True)

    def read(self, offset: int, tensor: torch.Tensor) -> Future[None]:
        """Start filling a contiguous uint8 CPU tensor from ``offset``."""
        return self._start(offset, tensor, write=False)

    def flush(self) -> None:
        """Wait until what was written is on the device and have the page cache drop it: for measuring."""
        self._require_open()
        os.fsync(self._files.buffered)
        os.posix_fadvise(self._files.buffered, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Wait for what is in flight, then remove the file and its directory. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self.closed = True
            in_flight = list(self._in_flight)
        wait(in_flight)
        self._remove()

    def __enter__(self) -> SpillFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise SpillError(errno.EBADF, "a spill file belongs to the process that made it; this is a fork")
        if self.closed:
            raise SpillError(errno.EBADF, "the spill file is closed")

    def _reserve_to(self, end: int) -> bool:
        """Have the filesystem promise the file's first ``end`` bytes; False when it has no room."""
        begin = self._reserved_bytes
        if end <= begin or not self._can_reserve:
            return True
        step_end = min(-(-end // _RESERVE_STEP_BYTES) * _RESERVE_STEP_BYTES, self.budget_bytes)
        reason: str | None = None
        for target in (step_end, end):  # a whole step, else just what is asked for
            try:
                os.posix_fallocate(self._files.buffered, begin, target - begin)
            except OSError as error:
                reason = error.strerror
                if error.errno not in _FULL:
                    self._can_reserve = False  # this filesystem cannot promise; a write will tell
                    return True
            else:
                self._reserved_bytes = target
                self._told = ""
                return True
        self.stopped_by = reason or "for no reason given"
        if self.stopped_by != self._told:
            _log.warning("%s cannot grow to %s: %s", self.directory / FILE, format_bytes(end), reason)
        self._told = self.stopped_by
        return False

    def _start(self, offset: int, tensor: torch.Tensor, *, write: bool) -> Future[None]:
        size_bytes = tensor.numel()
        if tensor.dtype != torch.uint8 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError("only contiguous uint8 tensors in CPU memory go to disk and back")
        if offset % ALIGNMENT_BYTES or offset < 0 or offset + size_bytes > self.budget_bytes:
            raise ValueError(f"[{offset}, {offset + size_bytes}) is no aligned range of the spill file")
        starts = range(0, size_bytes, CHUNK_BYTES)
        address = tensor.data_ptr()
        transfer = _Transfer(tensor, chunks=len(starts), write=write)
        with self._lock:
            self._require_open()
            self._in_flight.add(transfer.future)
        if not starts:
            self._finish_chunk(transfer, 0, None)
        for start in starts:
            chunk_bytes = min(CHUNK_BYTES, size_bytes - start)
            try:
                self._pool.submit(self._run_chunk, transfer, address + start, chunk_bytes, offset + start)
            except RuntimeError as error:  # the interpreter is going down
                self._finish_chunk(transfer, 0, SpillError(errno.EBADF, str(error)))
        return transfer.future

    def _run_chunk(self, transfer: _Transfer, address: int, size_bytes: int, offset: int) -> None:
        error = transfer.error
        try:
            if error is None:  # else the rest is not worth the time
                move = self._write_chunk if transfer.write else self._read_chunk
                move(address, size_bytes, offset)
        except OSError as cause:
            verb = "write" if transfer.write else "read"
            where = self.directory / FILE
            failed = f"cannot {verb} {size_bytes} bytes at {offset} of {where}"
            free = "free some of that disk, or " if transfer.write else ""
            error = _spill_error(cause, failed, f"{free}give another disk_dir")
            error.__cause__ = cause
        except Exception as cause:  # whatever it is, it belongs to whoever waits
            error = cause
        self._finish_chunk(transfer, size_bytes, error)

    def _finish_chunk(self, transfer: _Transfer, size_bytes: int, error: Exception | None) -> None:
        with self._lock:
            if error is not None:
                transfer.error = transfer.error or error
            elif transfer.write:
                self.bytes_written += size_bytes
            else:
                self.bytes_read += size_bytes
            transfer.chunks_left -= 1
            last = transfer.chunks_left <= 0
        if last:
            transfer.finish()
            with self._lock:
                self._in_flight.discard(transfer.future)

    def _write_chunk(self, address: int, size_bytes: int, offset: int) -> None:
        padded_bytes = size_bytes
        if self.direct and (address % ALIGNMENT_BYTES or size_bytes % ALIGNMENT_BYTES):
            page = self._bounce.address()
            ctypes.memmove(page, address, size_bytes)
            address, padded_bytes = page, _round_up(size_bytes)  # the block is ours up to there
        self._files.move(os.pwrite, address, padded_bytes, offset, wanted_bytes=padded_bytes)

    def _read_chunk(self, address: int, size_bytes: int, offset: int) -> None:
        if not self.direct or not (address % ALIGNMENT_BYTES or size_bytes % ALIGNMENT_BYTES):
            self._files.move(pread_into, address, size_bytes, offset, wanted_bytes=size_bytes)
            return
        page = self._bounce.address()
        self._files.move(pread_into, page, _round_up(size_bytes), offset, wanted_bytes=size_bytes)
        ctypes.memmove(address, page, size_bytes)


class _Transfer:
    """One write or read: done with its last chunk, whatever became of the others."""

    def __init__(self, tensor: torch.Tensor, *, chunks: int, write: bool) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.write = write
        self.chunks_left = chunks
        self.error: Exception | None = None
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()  # from here on cancel() is refused

    def finish(self) -> None:
        self.tensor = None  # a failure's traceback refers to us, and must not hold memory
        if self.error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self.error)


class _BouncePages(threading.local):
    """A page-aligned chunk for each thread, made when first needed."""

    pages: ctypes.Array[ctypes.c_uint8] | None = None

    def address(self) -> int:
        if self.pages is None:
            self.pages = (ctypes.c_uint8 * CHUNK_BYTES).from_buffer(mmap.mmap(-1, CHUNK_BYTES))
        return ctypes.addressof(self.pages)


def _remove(pool: ThreadPoolExecutor, files: OpenFile, pid: int) -> None:
    if os.getpid() == pid:
        # No transfer is in flight: close has waited, or each would have kept the SpillFile alive.
        # Not waiting for the threads lets this run in one of them (a collector may choose it).
        pool.shutdown(wait=False)
        files.remove()


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _spill_error(error: OSError, failed: str, advice: str) -> SpillError:
    return SpillError(error.errno or errno.EIO, f"{failed}: {error.strerror or error}. To go on, {advice}")
