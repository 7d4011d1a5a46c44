"""Writes: which of its arguments an op changes, by its schema and where that is silent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from torchlms.eager.per_op import PerOp

# Running statistics, by position, and where the op says that it is training (-1: it always is). They are
# updated although no schema says so, and in training not read.
_STATISTICS = {
    "native_batch_norm": ((3, 4), 5),
    "cudnn_batch_norm": ((3, 4), 5),
    "miopen_batch_norm": ((3, 4), 5),
    "batch_norm_update_stats": ((1, 2), -1),
    "batch_norm_gather_stats": ((3, 4), -1),
    "batch_norm_gather_stats_with_counts": ((3, 4), -1),
}


def _statistics(func: Any) -> tuple[tuple[int, ...], int]:
    return _STATISTICS.get(getattr(func, "_opname", ""), ((), -1))


def _declared(func: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(func, "_schema", None)
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments if schema is not None else ())
        if argument.alias_info is not None and argument.alias_info.is_write
    )


# The arguments, by position and name, that the schema of an op says it writes.
_written = PerOp(_declared)
# Those that an op writes and its schema does not say so; and where it says whether it does.
_unsaid = PerOp(_statistics)
# Whether a call of the op may write anything.
writes_anything = PerOp(lambda func: bool(_declared(func) or _statistics(func)[0]))


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The arguments that this call writes."""
    for position, name in _written(func):
        item = args[position] if position < len(args) else kwargs.get(name)
        for part in item if isinstance(item, (list, tuple)) else (item,):
            if isinstance(part, torch.Tensor):
                yield part
    places, training = _unsaid(func)
    if places and (training < 0 or args[training]):
        for position in places:
            if isinstance(args[position], torch.Tensor):
                yield args[position]


def without_statistics(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with which a batch normalisation gives the same result and changes nothing."""
    places, training = _unsaid(func)
    if not places or training < 0 or not args[training]:
        return args
    return tuple(None if index in places else item for index, item in enumerate(args))
