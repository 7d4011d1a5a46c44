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

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def check(self) -> None:
        if self.tensor._version != self.version:
            raise _modified(self.tensor, self.tensor.shape, self.version)


class Saved:
    """A tensor in a slot's storage, at the version at which it was saved.

    As long as the storage is where it was, ``alias`` is the tensor, and the slot knows that it is ours. When
    the bytes leave, it is emptied; it shares the tensor's version counter all the time.
    """

    __slots__ = ("__weakref__", "alias", "layout", "slot", "version")

    def __init__(self, slot: Slot, tensor: torch.Tensor) -> None:
        self.slot = slot
        self.version = tensor._version
        self.alias = tensor.detach()
        # Once emptied: offset, shape and strides in the storage.
        self.layout: tuple[int, torch.Size, tuple[int, ...]] | None = None
        slot.seen_by(self)

    def check(self) -> None:
        if self.alias._version != self.version:
            shape = self.alias.shape if self.layout is None else self.layout[1]
            raise _modified(self.alias, shape, self.version)

    def empty(self) -> None:
        """Let go of the storage, which is about to go."""
        alias = self.alias
        self.layout = (int(alias.storage_offset()), alias.shape, alias.stride())
        alias.data = alias.new_empty(0)

    def rebuild(self) -> torch.Tensor:
        """The tensor, same shape, strides, offset and bits; waits for a copy if one is under way."""
        storage = self.slot.take()
        rebuilt = self.alias.detach()  # shares the version: a backward that writes to it is noticed
        if self.layout is not None:
            empty = self.alias.new_empty(0)
            rebuilt.data = empty.set_(storage, *self.layout)  # type: ignore[call-overload]
        return rebuilt


def memoryless_alias(tensor: torch.Tensor, hollow: torch.Tensor) -> torch.Tensor:
    """A tensor with ``tensor``'s version counter and the storage of ``hollow``, an empty tensor alike."""
    alias = tensor.detach()
    alias.data = hollow
    return alias


def _modified(tensor: torch.Tensor, shape: torch.Size, then: int) -> RuntimeError:
    return RuntimeError(
        _MODIFIED.format(kind=tensor.type(), shape=list(shape), now=tensor._version, then=then)
    )
