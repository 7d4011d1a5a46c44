"""Device: the verbs the executor needs of a place that computes, on CUDA and on the CPU.

The CPU stands in for a device with the same verbs: its copies are futures instead of stream work,
and its budget is a ledger instead of the allocator's cap. Nothing above this file asks which it is.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from torchlms.errors import BadOption, BudgetTooSmall, NotSupported, SpillError
from torchlms.memory.ledger import Ledger
from torchlms.memory.limits import format_bytes

_SMALL_PAGE_BYTES = 4 << 20  # what the allocator maps at a time for small blocks, and some more


class Copy(Protocol):
    """A copy in flight. Whoever drops the bytes it touches must ``wait`` first."""

    def wait(self) -> None:
        """Order the compute queue after the copy; on the CPU, block until it is done."""

    def done(self) -> bool: ...


class Mark(Protocol):
    """A point on the compute queue that can be asked for the time since another."""

    def since_s(self, earlier: Any) -> float: ...
    def passed(self) -> bool: ...
    def wait(self) -> None: ...


class Device(Protocol):
    """What both kinds of device can do."""

    torch_device: torch.device
    is_cuda: bool

    def cap(self, budget_bytes: int) -> None: ...
    def uncap(self) -> None: ...
    def allocated_bytes(self) -> int: ...
    def held_bytes(self) -> int: ...
    def mark(self) -> Mark: ...
    def synchronize(self) -> None: ...


class CudaCopy:
    """An event on a copy stream, and the copy that recorded it."""

    __slots__ = ("device", "event")

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self.event = event
        self.device = device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def done(self) -> bool:
        return bool(self.event.query())


class FutureCopy:
    """Work of a thread. On a device it ends with a copy whose event ``wait`` also needs."""

    __slots__ = ("future", "pid")

    def __init__(self, future: Future[Any]) -> None:
        self.future = future
        self.pid = os.getpid()

    def wait(self) -> None:
        if self.pid != os.getpid():
            raise SpillError("a forked child has none of the threads that copy: what had left stays away")
        futures.wait((self.future,))
        error = self.future.exception()
        if error is not None:
            raise afresh(error)
        last = self.future.result()
        if isinstance(last, CudaCopy):
            last.wait()

    def done(self) -> bool:
        return self.future.done() and self.future.exception() is None


def afresh(error: BaseException) -> BaseException:
    """An error like ``error`` to raise. The one that a future keeps would take the frames that it passes
    into its traceback, and with them all their tensors, for as long as the future lives."""
    try:
        return copy.copy(error).with_traceback(None)
    except TypeError:  # it cannot be made from its arguments
        return RuntimeError(f"{type(error).__name__}: {error}")


class CudaMark:
    __slots__ = ("event",)

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(torch.cuda.current_stream(device))

    def since_s(self, earlier: CudaMark) -> float:
        return earlier.event.elapsed_time(self.event) / 1e3

    def passed(self) -> bool:
        """Whether the device is past this point: it waits for the program, or soon will."""
        return bool(self.event.query())

    def wait(self) -> None:
        """Until the device is past this point, whatever has been queued behind it."""
        self.event.synchronize()


class CpuMark:
    __slots__ = ("at_s",)

    def __init__(self) -> None:
        self.at_s = time.perf_counter()

    def since_s(self, earlier: CpuMark) -> float:
        return self.at_s - earlier.at_s

    def passed(self) -> bool:
        """Always: the program is the device."""
        return True

    def wait(self) -> None:
        """Not at all."""


class CudaDevice:
    """One CUDA device; its budget is what the caching allocator may reserve."""

    is_cuda = True

    def __init__(self, torch_device: torch.device) -> None:
        index = torch_device.index if torch_device.index is not None else torch.cuda.current_device()
        self.torch_device = torch.device("cuda", index)
        self.total_bytes = int(torch.cuda.get_device_properties(index).total_memory)
        self.cap_bytes = self.total_bytes  # what the allocator may reserve
        self.page_bytes = 20 << 20  # what the allocator maps at a time for large blocks
        self._fraction_before: float | None = None

    def available_bytes(self) -> int:
        """What this process could have: free now, plus what its allocator already holds."""
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        return int(free_bytes) + torch.cuda.memory_reserved(self.torch_device)

    def cap(self, budget_bytes: int) -> None:
        """Limit what the allocator may reserve; the earlier limit is kept for ``uncap``."""
        reserved_bytes = torch.cuda.memory_reserved(self.torch_device)
        if reserved_bytes > budget_bytes:
            reserved_bytes = self.held_bytes()
        if reserved_bytes > budget_bytes:
            raise _in_use_already(self.torch_device, reserved_bytes, budget_bytes)
        if self._fraction_before is None:
            self._fraction_before = float(torch.cuda.get_per_process_memory_fraction(self.torch_device))
        # The allocator compares what is asked for, and then maps whole pages.
        self.cap_bytes = min(self.total_bytes, max(1, budget_bytes - self.page_bytes - _SMALL_PAGE_BYTES))
        fraction = self.cap_bytes / self.total_bytes
        torch.cuda.set_per_process_memory_fraction(fraction, self.torch_device)

    def uncap(self) -> None:
        if self._fraction_before is not None:
            torch.cuda.set_per_process_memory_fraction(self._fraction_before, self.torch_device)
            self._fraction_before = None

    def allocated_bytes(self) -> int:
        # The nested form: to flatten it takes ten times as long, and this is asked for at each step.
        stats = torch.cuda.memory_stats_as_nested_dict(self.torch_device)
        return int(stats["allocated_bytes"]["all"]["current"])

    def held_bytes(self) -> int:
        """What stays reserved when all that is free is given back, which this does."""
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_reserved(self.torch_device))

    def mark(self) -> CudaMark:
        return CudaMark(self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)


class CpuDevice:
    """The CPU as a device; its budget is enforced by whoever asks the ledger before allocating."""

    is_cuda = False

    def __init__(self, ledger: Ledger) -> None:
        self.torch_device = torch.device("cpu")
        self.ledger = ledger

    def cap(self, budget_bytes: int) -> None:
        """Refuse a budget below what the ledger counts already."""
        if self.ledger.live_bytes > budget_bytes:
            raise _in_use_already(self.torch_device, self.ledger.live_bytes, budget_bytes)

    def uncap(self) -> None:
        pass

    def allocated_bytes(self) -> int:
        return self.ledger.live_bytes

    def held_bytes(self) -> int:
        return self.ledger.live_bytes

    def mark(self) -> CpuMark:
        return CpuMark()

    def synchronize(self) -> None:
        pass


def _in_use_already(device: torch.device, used_bytes: int, budget_bytes: int) -> BudgetTooSmall:
    return BudgetTooSmall(
        f"{format_bytes(used_bytes)} of {device} are in use already, {used_bytes - budget_bytes} bytes more "
        f"than the budget of {format_bytes(budget_bytes)}: the smallest budget now is "
        f"{format_bytes(used_bytes)} ({used_bytes} bytes), and a step needs more than that; or free tensors "
        "first",
        smallest_bytes=used_bytes,
    )


def read_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant, with its index; nothing means a CUDA device where there is one.

    Raises BadOption for what torch cannot read or does not see here.
    """
    try:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        read = torch.device(default if device in (None, "") else device)
    except (RuntimeError, TypeError) as error:
        raise BadOption(f"device {device}: choose cuda, cuda:1 or cpu") from error
    if read.type != "cuda":
        return torch.device("cpu") if read.type == "cpu" else read
    if not torch.cuda.is_available():
        raise BadOption(f"device {device}: this torch sees no CUDA device; use cpu")
    if read.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if read.index >= torch.cuda.device_count():
        raise BadOption(
            f"device {device}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
        )
    return read


def supported(device: torch.device) -> torch.device:
    """``device``, or NotSupported if LMS does not know its kind."""
    if device.type not in ("cuda", "cpu"):
        raise NotSupported(f"device {device} is not supported: choose cuda or cpu")
    return device


def open_device(
    torch_device: torch.device, make_ledger: Callable[[], Ledger] = Ledger
) -> CudaDevice | CpuDevice:
    """The Device for ``torch_device``; NotSupported names what is."""
    return CudaDevice(torch_device) if supported(torch_device).type == "cuda" else CpuDevice(make_ledger())
