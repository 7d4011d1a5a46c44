"""SpillFile: the disk tier, one file per process, written and read by threads past the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import re
import secrets
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeAlias

import platformdirs
import torch

from torchlms.errors import SpillError
from torchlms.memory.freelist import FreeList
from torchlms.memory.limits import disk_free_bytes, format_bytes

ALIGNMENT_BYTES = 4096  # of offsets, sizes and addresses, as O_DIRECT wants them
CHUNK_BYTES = 8 << 20

_RESERVE_STEP_BYTES = 256 << 20
_LEAVE_FREE = 0.05  # share of the free disk that a spill file without a budget leaves to others
_FILE, _LOCK = "spill.bin", "lock"
_OWN = re.compile(r"torchlms-\d+-[0-9a-f]{16}")
_BEING_MADE = re.compile(r"\.torchlms-\d+-[0-9a-f]{16}")
_BEING_MADE_LONGEST_S = 3600.0
_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

_Call: TypeAlias = Callable[[int, memoryview, int], int]

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
            self._files = _Files(directory)
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
            _log.warning("%s cannot grow to %s: %s", self.directory / _FILE, format_bytes(end), reason)
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
            where = self.directory / _FILE
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
            self._files.move(_pread_into, address, size_bytes, offset, wanted_bytes=size_bytes)
            return
        page = self._bounce.address()
        self._files.move(_pread_into, page, _round_up(size_bytes), offset, wanted_bytes=size_bytes)
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


class _Files:
    """The directory of this process with its lock, and two descriptors of one file: buffered and direct."""

    def __init__(self, parent: Path) -> None:
        self.directory, self.lock = _make_own_directory(parent)
        self.buffered = self.direct = self._direct = -1
        path = self.directory / _FILE
        try:
            self.buffered = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.direct = self._direct = _open_direct(path)
        except BaseException:
            self.remove()
            raise
        _live.add(self)

    def move(self, call: _Call, address: int, size_bytes: int, offset: int, *, wanted_bytes: int) -> None:
        """Repeat ``call`` until at least ``wanted_bytes`` of ``size_bytes`` have moved."""
        view = memoryview((ctypes.c_uint8 * size_bytes).from_address(address))
        done = 0
        while done < wanted_bytes:
            # After a short count the rest is no longer aligned, and goes through the page cache.
            descriptor = self.direct if self.direct >= 0 and done % ALIGNMENT_BYTES == 0 else self.buffered
            try:
                count = call(descriptor, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or descriptor == self.buffered:
                    raise
                self.direct = -1  # a filesystem that wants something else again; buffered from now on
                continue
            if count == 0:
                raise OSError(errno.EIO, f"the file ended {wanted_bytes - done} bytes early")
            done += count

    def close(self) -> None:
        descriptors = (self.buffered, self._direct, self.lock)
        self.buffered = self.direct = self._direct = self.lock = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    def remove(self) -> None:
        _remove_directory(self.directory)
        self.close()


_live: weakref.WeakSet[_Files] = weakref.WeakSet()


def _forget_after_fork() -> None:
    # Else a child that outlives a killed parent would hold the lock, and the space, for as long.
    for files in list(_live):
        files.close()


os.register_at_fork(after_in_child=_forget_after_fork)


def default_directory() -> Path:
    """The user's cache directory or else the temporary one: the first that is not a memory filesystem."""
    candidates = (platformdirs.user_cache_path("torchlms") / "spill", Path(tempfile.gettempdir()))
    for candidate in candidates:
        with contextlib.suppress(OSError):
            candidate.mkdir(parents=True, exist_ok=True)
            if os.access(candidate, os.W_OK) and filesystem_type(candidate) not in _MEMORY_FILESYSTEMS:
                return candidate
    return candidates[-1]


def directory_for(disk_dir: str | os.PathLike[str] | None) -> Path:
    """Where to spill: the directory that was given, or the default one."""
    return default_directory() if disk_dir is None else Path(disk_dir)


def filesystem_type(path: Path, *, mounts: Path = Path("/proc/self/mounts")) -> str:
    """What the kernel calls the filesystem that holds ``path``; "" when it does not tell."""
    resolved, best, kind = path.resolve(), "", ""
    with contextlib.suppress(OSError):
        for line in mounts.read_text(errors="replace").splitlines():
            _, point, fstype, *_ = line.split(" ")
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
            # Of two mounts on one point the later one is what is seen.
            if resolved.is_relative_to(point) and len(point) >= len(best):
                best, kind = point, fstype
    return kind


def remove_stale(directory: Path) -> None:
    """Remove what ended processes left in ``directory``: every ``torchlms-*`` whose lock can be taken."""
    for entry in os.scandir(directory):
        with contextlib.suppress(OSError):  # someone else's, or someone else was quicker
            if not entry.is_dir(follow_symlinks=False):
                continue
            age_s = time.time() - entry.stat(follow_symlinks=False).st_mtime
            half_made = _BEING_MADE.fullmatch(entry.name) and age_s > _BEING_MADE_LONGEST_S
            if _OWN.fullmatch(entry.name) or half_made:
                _remove_if_unlocked(Path(entry.path))


def _make_own_directory(parent: Path) -> tuple[Path, int]:
    """A locked directory. It gets its name after its lock, so nobody can find it without one."""
    name = f"torchlms-{os.getpid()}-{secrets.token_hex(8)}"
    making = parent / f".{name}"
    making.mkdir(mode=0o700)
    lock = -1
    try:
        lock = os.open(making / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # then nobody can take it later either, and it is never stale
            _log.warning("no locks in %s (%s): a killed process will leave its file", parent, error.strerror)
        making.rename(parent / name)
    except BaseException:
        _remove_directory(making)
        if lock >= 0:
            os.close(lock)
        raise
    return parent / name, lock


def _remove_if_unlocked(directory: Path) -> None:
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # the lock goes last: whoever was removing this did not finish
        _remove_directory(directory)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_directory(directory)
    finally:
        os.close(lock)


def _remove_directory(directory: Path) -> None:
    """Only the two files we make: whatever else a user put there stays, and so does the directory."""
    for name in (_FILE, _LOCK):
        with contextlib.suppress(OSError):
            (directory / name).unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()


def _remove(pool: ThreadPoolExecutor, files: _Files, pid: int) -> None:
    if os.getpid() == pid:
        # No transfer is in flight: close has waited, or each would have kept the SpillFile alive.
        # Not waiting for the threads lets this run in one of them (a collector may choose it).
        pool.shutdown(wait=False)
        files.remove()


def _open_direct(path: Path) -> int:
    """A descriptor that bypasses the page cache and has shown that it works; -1 when there is none."""
    descriptor, works = -1, False
    page = mmap.mmap(-1, ALIGNMENT_BYTES)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        moved = os.pwrite(descriptor, page, 0), os.preadv(descriptor, [page], 0)
        works = moved == (ALIGNMENT_BYTES, ALIGNMENT_BYTES)
    except OSError as error:
        _log.debug("no O_DIRECT for %s: %s", path, error)
    finally:  # an interrupt, too
        if descriptor >= 0 and not works:
            os.close(descriptor)
    return descriptor if works else -1


def _pread_into(descriptor: int, view: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [view], offset)


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _spill_error(error: OSError, failed: str, advice: str) -> SpillError:
    return SpillError(error.errno or errno.EIO, f"{failed}: {error.strerror or error}. To go on, {advice}")
