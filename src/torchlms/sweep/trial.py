"""Trial: one call of one op, run again on the same inputs, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch

from torchlms.eager.traits import generator_of


class Verdict(str, Enum):
    """What trials have shown of an op. In the order of the list the first that applies is its verdict."""

    DIFFERS = "differs"  # another run gave other bits, or another layout
    WRITES = "writes"  # it changed an input that its schema does not name
    RANDOM = "random"  # it draws numbers, and others from the same state of its generator
    SEEDED = "seeded"  # it draws numbers: the same bits again from the same state of its generator
    VIEW = "view"  # its result lies in an input's storage: there is nothing to keep
    IN_PLACE = "in place"  # it changes what its schema says, and does the same to a copy
    PURE = "pure"  # same bits again, and nothing else changed


Leaves = list[torch.Tensor]


def try_again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Verdict | None, str]:
    """Run ``func``, and twice more on copies of what it was given; its result, the verdict and why.
    No verdict on what does not return plain tensors.

    Copies keep shape, strides, offset and all of the storage, and tensors that share a storage share
    their copy. Bits are compared, so that NaN equals NaN and -0.0 does not equal 0.0. An op that draws
    random numbers finds its generator as the first run did.
    """
    again = [_Copies() for _ in range(2)]
    inputs = [(copies.of(args), copies.of(kwargs)) for copies in again]
    before = _Copies()
    before.of(args), before.of(kwargs)
    written = {id(tensor) for tensor in _written(func, args, kwargs)}
    given = list(leaves((args, kwargs)))
    generator = generator_of(func, args, kwargs)
    state = generator.get_state() if generator is not None else None
    result = func(*args, **kwargs)
    if not all(plain(tensor) for tensor in leaves(result)):
        return result, None, ""
    verdict, why = _judge_inputs(func, given, written, before, result)
    if verdict in (Verdict.WRITES, Verdict.VIEW):
        return result, verdict, why
    for copies, (copied_args, copied_kwargs) in zip(again, inputs, strict=True):
        if generator is not None and state is not None:
            generator.set_state(state)  # which leaves it, in the end, as the first run did
        other = func(*copied_args, **copied_kwargs)
        difference = _difference(list(leaves(result)), list(leaves(other)))
        for tensor in given:
            if not difference and id(tensor) in written:
                difference = _difference([tensor], [copies.of(tensor)])
        if difference:
            return result, Verdict.DIFFERS if generator is None else Verdict.RANDOM, difference
    if generator is not None:
        return result, Verdict.SEEDED, "draws random numbers"
    return result, verdict, why


def _judge_inputs(
    func: Any, given: Leaves, written: set[int], before: _Copies, result: Any
) -> tuple[Verdict, str]:
    touched = {tensor.untyped_storage()._cdata for tensor in given if id(tensor) in written}
    for index, tensor in enumerate(given):
        if tensor.untyped_storage()._cdata in touched:
            continue
        if not _same_storage(tensor, before.of(tensor)):
            return Verdict.WRITES, f"changed tensor argument {index}, which its schema does not say"
    if touched:
        return Verdict.IN_PLACE, "writes what its schema says"
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    if any(tensor.untyped_storage()._cdata in storages for tensor in leaves(result)):
        return Verdict.VIEW, "returns a view of an argument"
    return Verdict.PURE, ""


class _Copies:
    """Copies of tensors that share storages as the originals do."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._tensors: dict[int, torch.Tensor] = {}

    def of(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            if id(item) not in self._tensors:
                self._tensors[id(item)] = self._copy(item)
            return self._tensors[id(item)]
        if type(item) in (list, tuple):
            return type(item)(self.of(part) for part in item)
        if type(item) is dict:
            return {name: self.of(part) for name, part in item.items()}
        return item

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        copied = self._storages.setdefault(storage._cdata, storage.clone())
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(copied, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]


def plain(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is nothing but bytes in a storage."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized or tensor._is_zerotensor())
    )


def leaves(item: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from leaves(part)
    elif isinstance(item, dict):
        yield from leaves(list(item.values()))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Leaves:
    found: Leaves = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            item = args[position] if position < len(args) else kwargs.get(argument.name)
            found += leaves([item])
    return found


def _difference(left: Leaves, right: Leaves) -> str:
    """How the second run's results differ, in words; empty if not at all."""
    if len(left) != len(right):
        return "another number of results"
    for index, (first, second) in enumerate(zip(left, right, strict=True)):
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return f"result {index} has another type or shape"
        if first.stride() != second.stride() or first.storage_offset() != second.storage_offset():
            return f"result {index} lies otherwise in memory"
        if first.untyped_storage().nbytes() != second.untyped_storage().nbytes():
            return f"result {index} has a storage of another size"
        if not _same_storage(first, second):
            return f"result {index} has other bits"
    return ""


def _same_storage(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether all bytes of two tensors' storages are equal."""
    views = [
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())  # type: ignore[call-overload]
        for tensor in (left, right)
    ]
    return bool(torch.equal(*views))
