"""Spill place: where a spill file may lie, in a directory of its process alone, and what ended ones left.

The directory is ``torchlms-<pid>-<random>``, with a lock in it that is held as long as the process lives:
however that ended, whoever looks into the place next takes away what it left.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import tempfile
import time
from pathlib import Path

import platformdirs

FILE = "spill.bin"

_LOCK = "lock"
_OWN = re.compile(r"torchlms-\d+-[0-9a-f]{16}")
_BEING_MADE = re.compile(r"\.torchlms-\d+-[0-9a-f]{16}")
_BEING_MADE_LONGEST_S = 3600.0
_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")

_log = logging.getLogger(__name__)


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


def make_own_directory(parent: Path) -> tuple[Path, int]:
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
        remove_directory(making)
        if lock >= 0:
            os.close(lock)
        raise
    return parent / name, lock


def _remove_if_unlocked(directory: Path) -> None:
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # the lock goes last: whoever was removing this did not finish
        remove_directory(directory)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_directory(directory)
    finally:
        os.close(lock)


def remove_directory(directory: Path) -> None:
    """Only the two files we make: whatever else a user put there stays, and so does the directory."""
    for name in (FILE, _LOCK):
        with contextlib.suppress(OSError):
            (directory / name).unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()
