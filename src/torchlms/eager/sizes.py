"""How many bytes an op's results will take, found before it runs by running it on meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

Key = tuple[Any, ...]


class ResultSizes:
    """Sizes of the new storages each call returns, remembered by op and argument signature."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[int, ...]] = {}

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Bytes of every storage ``func`` will return that is not one of its arguments'."""
        if not may_return_fresh(func):
            return ()
        key = signature(func, args, kwargs)
        sizes = self._known.get(key)
        if sizes is None:
            sizes = _on_meta(func, args, kwargs)
            if torch.Tag.dynamic_output_shape not in func.tags:
                self._known[key] = sizes
        return sizes


def signature(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    """What the result sizes of a call depend on: shapes, strides, types and plain arguments."""
    return (func, _freeze(args), _freeze(tuple(sorted(kwargs.items()))) if kwargs else ())


def _freeze(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return (item.dtype, tuple(item.shape), item.stride() if item.layout is torch.strided else item.layout)
    if isinstance(item, (list, tuple)):
        return tuple(_freeze(entry) for entry in item)
    return item if item.__hash__ is not None else repr(item)


_FRESH: dict[Any, bool] = {}


def may_return_fresh(func: Any) -> bool:
    """Whether ``func`` can return a tensor that aliases none of its arguments, by its schema."""
    known = _FRESH.get(func)
    if known is None:
        schema = getattr(func, "_schema", None)
        known = schema is None or any(result.alias_info is None for result in schema.returns)
        _FRESH[func] = known
    return known


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    meta_args = tree_map(_to_meta, args)
    meta_kwargs = {name: _to_meta_option(name, item) for name, item in kwargs.items()}
    try:
        results = func(*meta_args, **meta_kwargs)
    except Exception:  # no meta kernel, or sizes that depend on data: guess generously instead
        return (sum(_tensor_bytes(leaf) for leaf in tree_leaves((args, kwargs))),)
    ours = {
        leaf.untyped_storage()._cdata
        for leaf in tree_leaves((meta_args, meta_kwargs))
        if isinstance(leaf, torch.Tensor)
    }
    fresh: dict[int, int] = {}
    for leaf in tree_leaves(results):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            storage = leaf.untyped_storage()
            if storage._cdata not in ours:
                fresh[storage._cdata] = storage.nbytes()
    return tuple(fresh.values())


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


def _tensor_bytes(leaf: Any) -> int:
    return leaf.untyped_storage().nbytes() if isinstance(leaf, torch.Tensor) else 0
