"""Leaves: what a custom Function finds of its parameters in ``ctx.saved_tensors``.

Under saved-tensor hooks autograd hands its backward an alias of a saved parameter, and not the parameter:
a gradient that it writes into ``weight.grad`` itself would be lost, and ``weight.main_grad`` would not be
found. As long as LMS is on, the parameter is handed back, as without hooks. Where other hooks than ours took
the tensors (a checkpoint's, ``save_on_cpu``), plain PyTorch hands out an alias, too, and so do we.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from torchlms.eager import private
from torchlms.eager.saver import Saver
from torchlms.eager.tensors import is_plain

if TYPE_CHECKING:
    import torch

_SAVE, _SAVED = "save_for_backward", "saved_tensors"
_OURS = "_torchlms_took_them"
_sessions = 0


def hand_back_leaves(undo: ExitStack) -> None:
    """From here on; ``undo`` gets the opposite. Where somebody else has changed them, nothing is done."""
    global _sessions
    if not _sessions and not {_SAVE, _SAVED}.isdisjoint(vars(BackwardCFunction)):
        return
    _sessions += 1
    setattr(BackwardCFunction, _SAVE, _save_for_backward)
    setattr(BackwardCFunction, _SAVED, _saved_tensors)
    undo.callback(_no_more)


def _no_more() -> None:
    global _sessions
    _sessions -= 1
    if _sessions:
        return
    for name, ours in ((_SAVE, _save_for_backward), (_SAVED, _saved_tensors)):
        if vars(BackwardCFunction).get(name) is ours:
            delattr(BackwardCFunction, name)


def _save_for_backward(ctx: Any, *tensors: Any) -> None:
    """As torch's own; notes whose hooks will take ``tensors`` when the forward pass of the Function ends."""
    hooks = private.top_saved_tensor_hooks()
    if hooks is not None and getattr(hooks[0], "__func__", None) is Saver.pack:
        setattr(ctx, _OURS, True)
    super(BackwardCFunction, ctx).save_for_backward(*tensors)


def _itself_or_alias(ctx: Any) -> Any:
    found = super(BackwardCFunction, ctx).saved_tensors
    if not isinstance(found, tuple) or not getattr(ctx, _OURS, False):
        return found
    return tuple([_itself(tensor) for tensor in found])


_saved_tensors = property(_itself_or_alias)


def _itself(tensor: Any) -> Any:
    """The leaf of which ``tensor`` is an alias; else ``tensor``."""
    if tensor is None or not tensor.requires_grad or tensor.grad_fn is not None:
        return tensor
    if not is_plain(tensor) or tensor.is_mkldnn:
        return tensor
    with private.unwatched():
        leaf: Any = getattr(get_gradient_edge(tensor).node, "variable", None)
    return leaf if leaf is not None and is_plain(leaf) and _same(leaf, tensor) else tensor


def _same(leaf: torch.Tensor, alias: torch.Tensor) -> bool:
    """Whether both are all of the same bytes, which a leaf that has other data by now is not."""
    where = (leaf.untyped_storage()._cdata, leaf.storage_offset(), leaf.shape, leaf.stride())
    return where == (alias.untyped_storage()._cdata, alias.storage_offset(), alias.shape, alias.stride())


private.hide_from_compiler(_save_for_backward, _itself_or_alias)
