"""Leaves: what a custom Function finds of its parameters in ``ctx.saved_tensors``.

Under saved-tensor hooks autograd hands its backward an alias of a saved parameter, and not the parameter:
a gradient that it writes into ``weight.grad`` itself would be lost, and ``weight.main_grad`` would not be
found. As long as LMS is on, the parameter is handed back, as without hooks.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from torchlms.eager import private

if TYPE_CHECKING:
    import torch

_NAME = "saved_tensors"
_sessions = 0


def hand_back_leaves(undo: ExitStack) -> None:
    """From here on; ``undo`` gets the opposite."""
    global _sessions
    if _NAME in vars(BackwardCFunction) and not _sessions:
        return  # somebody else has seen to it
    _sessions += 1
    setattr(BackwardCFunction, _NAME, property(_saved_tensors))
    undo.callback(_no_more)


def _no_more() -> None:
    global _sessions
    _sessions -= 1
    if not _sessions:
        delattr(BackwardCFunction, _NAME)


def _saved_tensors(ctx: Any) -> Any:
    found = super(BackwardCFunction, ctx).saved_tensors
    if not isinstance(found, tuple):
        return found
    return tuple([_itself(tensor) for tensor in found])


def _itself(tensor: Any) -> Any:
    """The leaf of which ``tensor`` is an alias; else ``tensor``."""
    if tensor is None or not tensor.requires_grad or tensor.grad_fn is not None:
        return tensor
    with private.unwatched():
        leaf: Any = getattr(get_gradient_edge(tensor).node, "variable", None)
    return leaf if leaf is not None and _same(leaf, tensor) else tensor


def _same(leaf: torch.Tensor, alias: torch.Tensor) -> bool:
    """Whether both are all of the same bytes, which a leaf that has other data by now is not."""
    where = (leaf.untyped_storage()._cdata, leaf.storage_offset(), leaf.shape, leaf.stride())
    return where == (alias.untyped_storage()._cdata, alias.storage_offset(), alias.shape, alias.stride())


private.hide_from_compiler(_saved_tensors)
