"""Ledger: how many bytes of tensor storage are alive, counted by us because nobody else does on a CPU."""

from __future__ import annotations

import torch

_MARK = "_torchlms_ledger"


class _Entry:
    """Lives in the storage's own Python object, so it dies exactly when the storage does."""

    __slots__ = ("ledger", "size_bytes")

    def __init__(self, ledger: Ledger, size_bytes: int) -> None:
        self.ledger = ledger
        self.size_bytes = size_bytes

    def __del__(self) -> None:
        self.ledger.live_bytes -= self.size_bytes


class Ledger:
    """Live bytes of every storage it was shown, whoever holds it: parameters, gradients, optimizer
    states and activations alike. Kernel scratch that never becomes a tensor is not seen."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0

    def add(self, storage: torch.UntypedStorage) -> bool:
        """Count ``storage`` once for as long as it lives; a resized one is counted anew.

        Returns whether it was not known before.
        """
        size_bytes = storage.nbytes()
        entry: _Entry | None = getattr(storage, _MARK, None)
        known = entry is not None and entry.ledger is self
        if entry is not None and known:
            if entry.size_bytes == size_bytes:
                return False
            self.live_bytes -= entry.size_bytes
            entry.size_bytes = size_bytes
        else:
            setattr(storage, _MARK, _Entry(self, size_bytes))
        self.live_bytes += size_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
        return not known

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes
