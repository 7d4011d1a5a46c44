"""Open file: the spill file of this process, past the page cache where that works, else through it."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from torchlms.memory.spill_place import FILE, make_own_directory, remove_directory

ALIGNMENT_BYTES = 4096  # of offsets, sizes and addresses, as O_DIRECT wants them

Call: TypeAlias = Callable[[int, memoryview, int], int]

_log = logging.getLogger(__name__)


class OpenFile:
    """The directory of this process with its lock, and two descriptors of one file: buffered and direct."""

    def __init__(self, parent: Path) -> None:
        self.directory, self.lock = make_own_directory(parent)
        self.buffered = self.direct = self._direct = -1
        path = self.directory / FILE
        try:
            self.buffered = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.direct = self._direct = _open_direct(path)
        except BaseException:
            self.remove()
            raise
        _live.add(self)

    def move(self, call: Call, address: int, size_bytes: int, offset: int, *, wanted_bytes: int) -> None:
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
        remove_directory(self.directory)
        self.close()


_live: weakref.WeakSet[OpenFile] = weakref.WeakSet()


def _forget_after_fork() -> None:
    # Else a child that outlives a killed parent would hold the lock, and the space, for as long.
    for files in list(_live):
        files.close()


os.register_at_fork(after_in_child=_forget_after_fork)


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


def pread_into(descriptor: int, view: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [view], offset)
