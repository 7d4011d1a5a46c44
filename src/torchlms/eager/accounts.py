"""Accounts: on a CPU, where no allocator counts for us, which storages are part of the budget."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torchlms.eager.tensors import tensors_in
from torchlms.errors import HostBudgetTooSmall, SpillError
from torchlms.memory.device import CpuDevice

if TYPE_CHECKING:
    import torch

    from torchlms.eager.ladder import Ladder
    from torchlms.eager.recorder import Recorder
    from torchlms.memory.device import CudaDevice


class Accounts:
    """Enters what the program's ops read and make into the ledger, and has it kept within the budget."""

    def __init__(self, device: CudaDevice | CpuDevice, ladder: Ladder) -> None:
        self._device = device
        self._ladder = ladder

    def discover(self, tensors: list[torch.Tensor], recorder: Recorder | None) -> None:
        """What an op reads and nobody made under our eyes counts from here on, and may press."""
        found = [tensor for tensor in tensors if self.add(tensor)]
        if not found:
            return
        if recorder is not None:
            for tensor in found:
                recorder.discovered(tensor)
        self._press()

    def count(self, result: Any) -> None:
        """The results of an op. More of them than was foreseen press, too."""
        for tensor in tensors_in((result,), {}):
            self.add(tensor)
        if self._device.allocated_bytes() > self._ladder.budget_bytes:
            self._press()

    def add(self, tensor: torch.Tensor) -> bool:
        """Whether the ledger had not known the storage."""
        device = self._device
        if not isinstance(device, CpuDevice) or tensor.device.type != "cpu":
            return False
        return device.ledger.add(tensor.untyped_storage())

    def _press(self) -> None:
        with contextlib.suppress(HostBudgetTooSmall, SpillError):  # whoever asks for more memory will be told
            self._ladder.fit(0)
