"""Kinds: which storages belong to the model or the optimizer, and so are not activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.parameter import is_lazy

from torchlms.core.tape import Kind

_MARKS = "_torchlms_"
_MARK = f"{_MARKS}kind"


class StorageKinds:
    """Labels parameters and buffers while LMS is on; finds gradients and states when asked.

    The label lives in the storage's own Python object and carries this object's identity, so that
    one left behind by another session means nothing.
    """

    def __init__(self, model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None) -> None:
        self._model = model
        self._optimizer = optimizer

    def label(self) -> None:
        for storage, kind in self.lasting():
            setattr(storage, _MARK, (id(self), kind))

    def unlabel(self) -> None:
        """Take every mark of this package, the ledger's and the recorder's too, off what outlives it."""
        for storage, _ in (*self.lasting(), *self.passing()):
            for name in [name for name in vars(storage) if name.startswith(_MARKS)]:
                delattr(storage, name)

    def of(self, storage: torch.UntypedStorage) -> Kind | None:
        """The kind of a labelled storage; None for one that may be an activation."""
        label = getattr(storage, _MARK, None)
        return label[1] if label is not None and label[0] == id(self) else None

    def lasting(self) -> Iterator[tuple[torch.UntypedStorage, Kind]]:
        """Parameters and buffers."""
        if self._model is not None:
            for parameter in self._model.parameters():
                yield from _with_storage(parameter.data, Kind.PARAMETER)
            for buffer in self._model.buffers():
                yield from _with_storage(buffer, Kind.BUFFER)

    def passing(self) -> Iterator[tuple[torch.UntypedStorage, Kind]]:
        """Gradients and optimizer states, as they are now: both come and go while the loop runs."""
        for parameter in self._parameters():
            # Of what is no leaf, as under torch.func.functional_call, only asking would give a warning.
            if parameter.is_leaf and parameter.grad is not None:
                yield from _with_storage(parameter.grad, Kind.GRADIENT)
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        for state in states:
            for item in state.values() if isinstance(state, dict) else ():
                if isinstance(item, torch.Tensor):
                    yield from _with_storage(item, Kind.STATE)

    def _parameters(self) -> Iterator[torch.Tensor]:
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                yield from group["params"]
        if self._model is not None:
            yield from self._model.parameters()


def _with_storage(tensor: torch.Tensor, kind: Kind) -> Iterator[tuple[torch.UntypedStorage, Kind]]:
    if is_lazy(tensor):  # nothing is known of it before the first forward pass
        return
    if tensor.layout is torch.strided and tensor.device.type != "meta":
        yield tensor.untyped_storage(), kind
