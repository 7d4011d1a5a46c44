"""Flags: the settings of torch that change bits or speed; set for a run, named in its result."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchlms.bench.options import BenchOptions

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_NOT_REPEATABLE = "does not have a deterministic implementation"


@dataclass(slots=True)
class Flags:
    """As they stood during the run. ``not_deterministic`` are ops that torch warned about."""

    cudnn_benchmark: bool
    deterministic: bool
    cudnn_deterministic: bool
    cublas_workspace_config: str | None
    tf32_matmul: bool
    tf32_cudnn: bool
    not_deterministic: list[str] = field(default_factory=list)


@contextlib.contextmanager
def flags_set(options: BenchOptions) -> Iterator[Flags]:
    """Set what the options ask for, and set it back.

    Deterministic mode only warns where an op has no repeatable form (adaptive and 3D pools): an
    error would leave such networks without any measurement. The result lists those ops.
    """
    cudnn = torch.backends.cudnn
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        cudnn.benchmark = options.cudnn_benchmark
        heard: list[warnings.WarningMessage] = []
        if options.deterministic:
            _be_deterministic(undo)
            undo.callback(_show_others, heard)
            undo.enter_context(_listening(heard))
        flags = Flags(
            cudnn_benchmark=cudnn.benchmark,
            deterministic=options.deterministic,
            cudnn_deterministic=cudnn.deterministic,
            cublas_workspace_config=os.environ.get(_CUBLAS),
            tf32_matmul=torch.backends.cuda.matmul.allow_tf32,
            tf32_cudnn=cudnn.allow_tf32,
        )
        yield flags
        texts = [str(note.message) for note in heard]
        flags.not_deterministic = sorted({text.split()[0] for text in texts if _NOT_REPEATABLE in text})


def _be_deterministic(undo: contextlib.ExitStack) -> None:
    cudnn = torch.backends.cudnn
    undo.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
    undo.callback(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filling: Any = torch.utils.deterministic
    undo.callback(setattr, filling, "fill_uninitialized_memory", filling.fill_uninitialized_memory)
    if _CUBLAS not in os.environ:
        os.environ[_CUBLAS] = ":4096:8"
        undo.callback(os.environ.pop, _CUBLAS, None)
    cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory with NaN finds bugs, costs a kernel per tensor and changes no bits.
    filling.fill_uninitialized_memory = False


@contextlib.contextmanager
def _listening(heard: list[warnings.WarningMessage]) -> Iterator[None]:
    """Put warnings into ``heard`` instead of on the screen."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: heard.append(
            warnings.WarningMessage(message, category, filename, lineno, file, line)
        )
        yield


def _show_others(caught: list[warnings.WarningMessage]) -> None:
    for note in caught:
        if _NOT_REPEATABLE not in str(note.message):
            warnings.warn_explicit(note.message, note.category, note.filename, note.lineno)
