"""Operators: the samples by which PyTorch tests gradients of its operators, all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from borrowed.case import Case, Group, Subject, seed, subject_of

_TYPES = (torch.float64, torch.complex128)  # those of PyTorch's own gradient tests


def groups() -> Iterator[Group]:
    """An operator in one type, out of place, and in place where it has gradients so."""
    from torch.testing._internal.autograd_function_db import autograd_function_db
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.custom_op_db import custom_op_db

    for info in (*op_db, *autograd_function_db, *custom_op_db):
        if not info.supports_autograd:
            continue
        named = info.name + (f".{info.variant_test_name}" if info.variant_test_name else "")
        for dtype in _TYPES:
            if dtype not in info.supported_backward_dtypes("cpu"):
                continue
            name = f"{named} {str(dtype).removeprefix('torch.')}"
            yield Group(name, partial(_cases, info, dtype, info.op, name))
            in_place = info.get_inplace()
            if in_place is not None and info.supports_inplace_autograd:
                name = f"{name} in place"
                yield Group(name, partial(_cases, info, dtype, in_place, name, in_place=True))


def _cases(
    info: Any, dtype: torch.dtype, function: Callable[..., Any], name: str, *, in_place: bool = False
) -> Iterator[Case]:
    seed()
    for index, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=True)):
        if in_place and sample.broadcasts_input:
            continue
        if not isinstance(sample.input, torch.Tensor) or sample.input.layout is torch.strided:
            yield Case(f"{name} #{index}", partial(_subject, function, sample))


def _subject(function: Callable[..., Any], sample: Any) -> Subject:
    def call(*args: Any, **kwargs: Any) -> Any:
        return sample.output_process_fn_grad(function(*args, **kwargs))

    return subject_of(call, (sample.input, *sample.args), sample.kwargs, None)
