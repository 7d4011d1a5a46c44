"""Saved: what autograd holds instead of a tensor, and how to turn it back into one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torchlms.eager.slot import Slot

_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: "
    "[{kind} {shape}] is at version {now}; expected version {then} instead. Hint: enable anomaly "
    "detection to find the operation that failed to compute its gradient, with "
    "torch.autograd.set_detect_anomaly(True)."
)


class Kept:
    """A tensor that stays where it is. It still checks its version, as plain PyTorch does and
    saved-tensor hooks on their own do not."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def check(self) -> None:
        if self.tensor._version != self.version:
            raise _modified(self.tensor, self.tensor.shape, self.version)


class Saved:
    """A view of a slot's storage: where in it, of what type, and at which version it was saved."""

    __slots__ = ("alias", "dtype", "offset", "shape", "slot", "strides", "version")

    def __init__(self, slot: Slot, tensor: torch.Tensor, alias: torch.Tensor) -> None:
        """``alias`` shares ``tensor``'s version counter and holds none of its memory."""
        self.slot = slot
        self.alias = alias
        self.version = tensor._version
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.strides = tensor.stride()
        self.offset = tensor.storage_offset()

    def check(self) -> None:
        if self.alias._version != self.version:
            raise _modified(self.alias, self.shape, self.version)

    def rebuild(self) -> torch.Tensor:
        """The tensor, same shape, strides, offset and bits; waits for a copy if one is under way."""
        storage = self.slot.take()
        rebuilt = self.alias.detach()  # shares the version: a backward that writes to it is noticed
        held = self.slot.held()
        if self._is_like(held):
            rebuilt.data = held
        else:
            empty = self.alias.new_empty(0)
            rebuilt.data = empty.set_(storage, self.offset, self.shape, self.strides)  # type: ignore[call-overload]
        return rebuilt

    def _is_like(self, held: torch.Tensor) -> bool:
        """Whether ``held``, in the same storage, is what was saved. Most often it is: the slot was made for
        it, and it has not left. A tensor made from it costs half as much as one made from the storage."""
        return (
            held.dtype is self.dtype
            and held.shape == self.shape
            and held.storage_offset() == self.offset
            and held.stride() == self.strides
        )


def memoryless_alias(tensor: torch.Tensor, hollow: torch.Tensor) -> torch.Tensor:
    """A tensor with ``tensor``'s version counter and the storage of ``hollow``, an empty tensor alike."""
    alias = tensor.detach()
    alias.data = hollow
    return alias


def _modified(tensor: torch.Tensor, shape: torch.Size, then: int) -> RuntimeError:
    return RuntimeError(
        _MODIFIED.format(kind=tensor.type(), shape=list(shape), now=tensor._version, then=then)
    )
