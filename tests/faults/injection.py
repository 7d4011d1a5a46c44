"""Injection: one thing that goes wrong at one moment of a run, by patching what the run calls.

Each fault has a ``moment``: which call of what it patches it strikes, counted over the whole run.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._ops import OpOverload

from torchlms.errors import HostBudgetTooSmall, SpillError
from torchlms.memory.disk import SpillFile
from torchlms.memory.store import Store

PERSISTS = 40  # calls for which a fault goes on that does not pass at once


class Users(Exception):
    """An exception of the user's own."""


class DeviceFails(RuntimeError):
    """What torch raises when the device itself does not do what it was told: no fault of memory or disk."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when."""

    kind: str
    moment: int

    @contextmanager
    def injected(self) -> Iterator[None]:
        target, name, make = KINDS[self.kind]
        right = getattr(target, name)
        with patch.object(target, name, make(right, Strikes(self.moment, LASTS.get(self.kind, 1)))):
            yield


class Strikes:
    """Counts calls; true for those that are struck."""

    def __init__(self, moment: int, lasts: int) -> None:
        self.struck = range(moment, moment + lasts)
        self.calls = 0

    def now(self) -> bool:
        self.calls += 1
        return self.calls - 1 in self.struck


Make = Callable[[Callable[..., Any], Strikes], Callable[..., Any]]


def raising(make_error: Callable[[], BaseException]) -> Make:
    def make(right: Callable[..., Any], strikes: Strikes) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if strikes.now():
                raise make_error()
            return right(*args, **kwargs)

        return call

    return make


def full(right: Callable[..., Any], strikes: Strikes) -> Callable[..., Any]:
    return lambda *args, **kwargs: None if strikes.now() else right(*args, **kwargs)


def short(right: Callable[..., Any], strikes: Strikes) -> Callable[..., Any]:
    """Half of the bytes: the system may do so at any time, and means no harm."""

    def call(descriptor: int, view: memoryview, offset: int) -> Any:
        part = max(1, len(view) // 2) if strikes.now() else len(view)
        return right(descriptor, view[:part], offset)

    return call


def slow(right: Callable[..., Any], strikes: Strikes) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if strikes.now():
            time.sleep(0.002)
        return right(*args, **kwargs)

    return call


def cut_off(right: Callable[..., Any], strikes: Strikes) -> Callable[..., Any]:
    """Somebody empties the spill file."""

    def call(self: SpillFile, *args: Any, **kwargs: Any) -> Any:
        if strikes.now():
            for path in self.directory.iterdir():
                os.truncate(path, 0)
        return right(self, *args, **kwargs)

    return call


def deleted(right: Callable[..., Any], strikes: Strikes) -> Callable[..., Any]:
    """Somebody deletes the spill file."""

    def call(self: SpillFile, *args: Any, **kwargs: Any) -> Any:
        if strikes.now():
            for path in self.directory.iterdir():
                path.unlink()
        return right(self, *args, **kwargs)

    return call


def raising_in_backward(right: Callable[..., Any], strikes: Strikes) -> Callable[..., Any]:
    """The gradient of what is returned meets a hook of the user's that raises."""

    def fail(_: torch.Tensor) -> None:
        raise Users

    def call(*args: Any) -> Any:
        out = right(*args)
        if strikes.now() and out.requires_grad:
            out.register_hook(fail)
        return out

    return call


def failing_later(right: Callable[..., Any], strikes: Strikes) -> Callable[..., Any]:
    """A copy that begins, and fails on its way."""

    def call(*args: Any, **kwargs: Any) -> Any:
        going: Future[None] = right(*args, **kwargs)
        if not strikes.now():
            return going
        failing: Future[None] = Future()
        # Not before the real one has ended: until then its tensor is in use.
        going.add_done_callback(lambda _: failing.set_exception(DeviceFails("on purpose")))
        return failing

    return call


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("on purpose. Tried to allocate 2.00 MiB")


def system_error(number: int) -> Callable[[], BaseException]:
    return lambda: OSError(number, "on purpose")


def spill_error() -> BaseException:
    return SpillError(errno.EIO, "on purpose")


def host_refused() -> BaseException:
    return HostBudgetTooSmall("on purpose", missing_bytes=1 << 20)


def device_fails() -> BaseException:
    return DeviceFails("on purpose")


OPS = (OpOverload, "__call__")
KINDS: dict[str, tuple[Any, str, Make]] = {
    "out of memory in an op": (*OPS, raising(out_of_memory)),
    "out of memory in an op and all after it": (*OPS, raising(out_of_memory)),
    "Ctrl-C before an op": (*OPS, raising(KeyboardInterrupt)),
    "exception in a module": (torch.nn.Linear, "forward", raising(Users)),
    "exception in backward": (torch.nn.Linear, "forward", raising_in_backward),
    "disk full when room is reserved": (SpillFile, "allocate", full),
    "disk full for a while": (SpillFile, "allocate", full),
    "disk full while writing": (os, "pwrite", raising(system_error(errno.ENOSPC))),
    "write error": (os, "pwrite", raising(system_error(errno.EIO))),
    "read error": (os, "preadv", raising(system_error(errno.EIO))),
    "slow writes": (os, "pwrite", slow),
    "slow reads": (os, "preadv", slow),
    "spill file emptied": (SpillFile, "read", cut_off),
    "spill file deleted": (SpillFile, "read", deleted),
    "a copy out cannot start": (SpillFile, "write", raising(spill_error)),
    "a copy in cannot start": (SpillFile, "read", raising(spill_error)),
    "the device fails as a copy out starts": (Store, "copy_out", raising(device_fails)),
    "the device fails as a copy in starts": (Store, "copy_in", raising(device_fails)),
    "the device fails during a copy out": (SpillFile, "write", failing_later),
    "the device fails during a copy in": (SpillFile, "read", failing_later),
    "host memory refused to a plan": (Store, "plan_arena", raising(host_refused)),
    "host memory refused to all plans": (Store, "plan_arena", raising(host_refused)),
    "exception as an update begins": (torch.optim.AdamW, "_init_group", raising(Users)),
    "exception in the middle of an update": (torch, "_foreach_sqrt", raising(Users)),
}
# What no run may even notice, but for its speed.
HARMLESS = ("host memory refused to a plan", "host memory refused to all plans", "slow writes", "slow reads")
LASTS = {
    "out of memory in an op and all after it": PERSISTS,
    "disk full for a while": PERSISTS,
    "slow writes": PERSISTS,
    "slow reads": PERSISTS,
    "host memory refused to all plans": PERSISTS,
}
