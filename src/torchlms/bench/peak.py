"""Peak memory of a run: the allocator's own figures on CUDA, a ledger of live storages on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchlms.memory.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchlms.bench.workload import Workload

_LEDGER_STEPS = 3  # the first lacks the optimizer states, the second makes them, the third is the measure


class LedgerMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every tensor that an op reads or makes to a ledger."""

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger
        self._device = device

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or one step under this mode would turn torch.compile off for good

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count([args, kwargs, result])
        return result

    def count(self, tree: Any) -> None:
        """Show every tensor in nested lists and dicts."""
        for tensor in _tensors(tree):
            if tensor.device.type == self._device.type and tensor.layout is torch.strided:
                self._ledger.add(tensor.untyped_storage())


def plain_peak_bytes(make_workload: Callable[[], Workload]) -> int:
    """Ledger peak of one training step on the CPU, everything counted.

    Parameters, buffers, gradients, optimizer states, inputs and activations alike. The workload is
    made anew, so that the timed pass before this one ran with nothing installed.
    """
    workload = make_workload()
    ledger = Ledger()
    mode = LedgerMode(ledger, workload.device)
    mode.count([*workload.model.parameters(), *workload.model.buffers(), workload.inputs, workload.target])
    with mode:
        for _ in range(_LEDGER_STEPS):
            ledger.reset_peak()
            workload.step()
    return ledger.peak_bytes


class AllocatorPeak:
    """The CUDA allocator's peaks, by phase (warm-up, timed) and over the whole run.

    ``each_step`` resets the counters after every step, which gives a peak per step. Not with LMS,
    which reads the same counters.
    """

    def __init__(self, device: torch.device, *, each_step: bool) -> None:
        self._device = device
        self._each_step = each_step
        self._on = device.type == "cuda"
        self.allocated_bytes = self.reserved_bytes = 0
        self.whole_allocated_bytes = self.whole_reserved_bytes = 0
        self.start_phase()

    def start_phase(self) -> None:
        """Forget the phase so far; the whole run is kept."""
        self.allocated_bytes = self.reserved_bytes = 0
        if self._on:
            torch.cuda.reset_peak_memory_stats(self._device)

    def after_step(self) -> int:
        """Take note; returns the peak of this step, or of this phase so far."""
        if not self._on:
            return 0
        peak_bytes = torch.cuda.max_memory_allocated(self._device)
        self.allocated_bytes = max(self.allocated_bytes, peak_bytes)
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved(self._device))
        self.whole_allocated_bytes = max(self.whole_allocated_bytes, self.allocated_bytes)
        self.whole_reserved_bytes = max(self.whole_reserved_bytes, self.reserved_bytes)
        if self._each_step:
            torch.cuda.reset_peak_memory_stats(self._device)
        return peak_bytes


def pinned_peak_bytes(device: torch.device) -> int:
    """Peak of torch's own pinned memory, where rivals put what they move; 0 where it is not counted."""
    read = getattr(torch.cuda, "host_memory_stats", None)
    if device.type != "cuda" or read is None:
        return 0
    stats = read()
    return int(stats.get("allocated_bytes.peak", 0))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)
