"""How many bytes an op's results will take, found before it runs by running it on meta tensors.

Meta kernels lie here and there: oneDNN's recurrent layer has a workspace that its meta kernel makes
empty. Where that is known a bound is used; otherwise the first real result corrects the figure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from torchlms.eager import private

Key = tuple[Any, ...]
_INDEX_BYTES = 8
_MOST_KNOWN = 20_000


class ResultSizes:
    """Sizes of the new storages each call returns, remembered by op and argument signature."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[int, ...]] = {}
        self._unproven: Key | None = None  # of the call asked about last, if it was met for the first time

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Bytes of every storage ``func`` will return that is not one of its arguments'."""
        self._unproven = None
        if not may_return_fresh(func):
            return ()
        key = signature(func, args, kwargs)
        if func in _RECURRENT:
            key = (*key, torch.is_grad_enabled())
        sizes = self._known.get(key)
        if sizes is None:
            sizes = _on_meta(func, args, kwargs)
            if torch.Tag.dynamic_output_shape not in func.tags:
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()  # arguments that are new each time would fill it for ever
                self._known[key] = sizes
                self._unproven = key
        return sizes

    def prove(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """The call asked about last has returned ``result``: correct what was too little, or a bound."""
        key, self._unproven = self._unproven, None
        if key is not None:
            sizes = _fresh_sizes((args, kwargs), result)
            if sum(sizes) > sum(self._known[key]) or key[0] in _RECURRENT:
                self._known[key] = sizes


def signature(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    """What the result sizes of a call depend on: shapes, strides, types and plain arguments."""
    name = getattr(func, "__name__", "")
    # A schedule makes new numbers for ever, and the results of few ops are as large as a number says.
    exact = any(part in name for part in ("range", "upsample"))
    named = _freeze(tuple(sorted(kwargs.items())), exact) if kwargs else ()
    return (func, _freeze(args, exact), named)


def _freeze(item: Any, exact: bool) -> Any:
    if isinstance(item, torch.Tensor):
        if item.is_nested:
            return (item.dtype, "nested")
        return (item.dtype, tuple(item.shape), item.stride() if item.layout is torch.strided else item.layout)
    if isinstance(item, (list, tuple)):
        return tuple(_freeze(entry, exact) for entry in item)
    if isinstance(item, float) and not exact:
        return float
    if isinstance(item, torch.Generator):  # some programs make a new one for every step
        return torch.Generator
    return item if item.__hash__ is not None else repr(item)


_FRESH: dict[Any, bool] = {}


def may_return_fresh(func: Any) -> bool:
    """Whether ``func`` can return a tensor that aliases none of its arguments, by its schema."""
    known = _FRESH.get(func)
    if known is None:
        schema = getattr(func, "_schema", None)
        known = schema is None or any(
            result.alias_info is None and "Tensor" in str(result.type) for result in schema.returns
        )
        _FRESH[func] = known
    return known


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    try:
        with private.unwatched():  # nobody else's mode should count these
            return _measure_on_meta(func, args, kwargs)
    except Exception:  # no meta kernel, or sizes that depend on data
        return _guessed(func, args, kwargs)


def _guessed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Bytes that cannot be known: indices are counted, all else is taken to be as large as its inputs."""
    inputs = _strided((args, kwargs))
    if func is torch.ops.aten.nonzero.default and inputs:
        with private.unwatched():
            return (_INDEX_BYTES * inputs[0].dim() * int(torch.count_nonzero(inputs[0])),)
    size_bytes = sum(leaf.untyped_storage().nbytes() for leaf in inputs)
    if "unique" in getattr(func, "__name__", ""):  # values, where each came from, and how often it is there
        size_bytes += sum(2 * _INDEX_BYTES * leaf.numel() for leaf in inputs)
    return (size_bytes,)


def _measure_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    meta_args = tree_map(_to_meta, args)
    meta_kwargs = {name: _to_meta_option(name, item) for name, item in kwargs.items()}
    results = func(*meta_args, **meta_kwargs)
    sizes = _fresh_sizes((meta_args, meta_kwargs), results)
    return (*sizes, _recurrent_workspace(args)) if func in _RECURRENT else sizes


def _fresh_sizes(inputs: Any, results: Any) -> tuple[int, ...]:
    """Bytes of every storage in ``results`` that is not one of ``inputs``."""
    ours = {_storage_of(leaf) for leaf in _strided(inputs)}
    fresh: dict[int, int] = {}
    again = []
    seen = set()
    for leaf in _strided(results):
        if id(leaf) in seen:  # a meta kernel that returns one tensor twice stands for two
            again.append(leaf.untyped_storage().nbytes())
        elif _storage_of(leaf) not in ours:
            fresh[_storage_of(leaf)] = leaf.untyped_storage().nbytes()
            seen.add(id(leaf))
    return (*fresh.values(), *again)


def _strided(tree: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]


def _storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


_RECURRENT = {
    getattr(packet, overload)
    for packet in [getattr(torch.ops.aten, "mkldnn_rnn_layer", None)]
    if packet is not None
    for overload in packet.overloads()
}


def _recurrent_workspace(args: tuple[Any, ...]) -> int:
    """A bound on the workspace of one recurrent layer: its gates, and the states around each step."""
    inputs, weight = args[0], args[2]
    if not torch.is_grad_enabled():
        return 0
    steps, batch, input_width = inputs.shape
    hidden = weight.shape[1]
    gates, state = _padded(weight.shape[0]), _padded(hidden)
    floats = steps * (gates + state) + 10 * (steps + 1) * _padded(max(input_width, hidden))
    return int(4 * batch * floats) + _WORKSPACE_PAGES_BYTES


def _padded(width: int) -> int:
    """oneDNN's leading dimension: whole cache lines, and not a multiple of 1 KiB."""
    padded = -(-width // 16) * 16
    return padded + 16 if padded % 256 == 0 else padded


_WORKSPACE_PAGES_BYTES = 16 * 4096  # each part of a workspace begins on a page


def _to_meta(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta")
    return torch.device("meta") if isinstance(item, torch.device) else item


def _to_meta_option(name: str, item: Any) -> Any:
    if name == "device":
        return torch.device("meta")
    if name == "generator":
        return None
    if name == "pin_memory":
        return False
    return tree_map(_to_meta, item)
