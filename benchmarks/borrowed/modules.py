"""Modules: the samples by which PyTorch tests its modules, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from borrowed.case import Case, Group, Subject, seed, subject_of

_TYPES = (torch.float32, torch.float64, torch.complex64)


def groups() -> Iterator[Group]:
    """A module in one type and one mode."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        for dtype in _TYPES:
            if dtype not in info.supported_dtypes("cpu"):
                continue
            for training in (True, False) if info.train_and_eval_differ else (True,):
                mode = "" if training else " in evaluation"
                name = f"{info.name} {str(dtype).removeprefix('torch.')}{mode}"
                yield Group(name, partial(_cases, info, dtype, training, name))


def _cases(info: Any, dtype: torch.dtype, training: bool, name: str) -> Iterator[Case]:
    seed()
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    for index, sample in enumerate(samples):
        if sample.forward_input is not None:
            yield Case(f"{name} #{index}", partial(_subject, info, dtype, training, sample))


def _subject(info: Any, dtype: torch.dtype, training: bool, sample: Any) -> Subject:
    seed()
    made, given = sample.constructor_input, sample.forward_input
    model = info.module_cls(*made.args, **made.kwargs).to(dtype=dtype).train(training)

    return subject_of(model, given.args, given.kwargs, model)
