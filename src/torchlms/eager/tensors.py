"""Tensors: which arguments are plain bytes in a storage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def tensors_in(args: Iterable[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Plain tensors among arguments or results, lists included."""
    found = []
    for item in (*args, *kwargs.values()):
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found.extend(tensors_in(item, {}))
    return [tensor for tensor in found if is_plain(tensor)]


def all_plain(args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether ``tensors_in`` finds every storage among arguments: none is inside a sparse or nested tensor,
    or one made of others."""
    for item in (*args, *kwargs.values()):
        if isinstance(item, torch.Tensor):
            if not is_plain(item):
                return False
        elif isinstance(item, (list, tuple)) and not all_plain(item, {}):
            return False
    return True


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is bytes in a storage: not sparse, nested, fake, nor made of other tensors."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return False
    kind = type(tensor)
    return kind is torch.Tensor or kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


_AS_IT_IS = contextlib.nullcontext()  # one for all: every saved tensor that is asked for enters it


def out_of_inference() -> contextlib.AbstractContextManager[None]:
    """Not in inference mode, which may lie around a backward pass: what is made in here may be written later
    on. Where it was on there are no gradients in here either; elsewhere nothing changes."""
    return _left_inference() if torch.is_inference_mode_enabled() else _AS_IT_IS


@contextlib.contextmanager
def _left_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def hollow(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor without any bytes, and no inference tensor: those cannot be written later on."""
    with out_of_inference():
        return torch.empty(0, dtype=dtype, device=device)


def unwritten(size_bytes: int, device: torch.device) -> torch.UntypedStorage:
    """New memory, with whatever lies there. ``torch.empty`` would write over all of it where the program asks
    for deterministic algorithms: for the blocks of a large convolution that takes as long as an op."""
    return torch.UntypedStorage(size_bytes, device=device)


def new_bytes(size_bytes: int, device: torch.device) -> torch.Tensor:
    """``unwritten`` memory, as uint8."""
    return whole(unwritten(size_bytes, device))


def whole(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of ``storage``."""
    empty = hollow(torch.uint8, storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))  # type: ignore[call-overload]
