"""Sweep: try every op that the samples bring about, and keep the worst that was seen of each."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchlms.sweep.samples import all_samples
from torchlms.sweep.trial import Verdict, leaves, plain, try_again

_MOST_TRIALS = 24  # of one op; what has been pure so often will be again
_MOST_BYTES = 64 << 20
_ORDER = list(Verdict)


@dataclass(slots=True)
class Finding:
    """The worst verdict over all trials of one op, why, and how many there were."""

    verdict: Verdict
    why: str
    trials: int = 1

    def add(self, verdict: Verdict, why: str) -> None:
        self.trials += 1
        if _ORDER.index(verdict) < _ORDER.index(self.verdict):
            self.verdict, self.why = verdict, why


class _Watch(TorchDispatchMode):
    """Tries each op that comes by, below autograd."""

    def __init__(self, findings: dict[str, Finding]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._findings = findings

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        finding = self._findings.get(str(func))
        if (finding is not None and finding.trials >= _MOST_TRIALS) or not _can_be_tried(args, kwargs):
            return func(*args, **kwargs)
        result, verdict, why = try_again(func, args, kwargs)
        if verdict is None:
            return result
        if finding is None:
            self._findings[str(func)] = Finding(verdict, why)
        else:
            finding.add(verdict, why)
        return result


def _can_be_tried(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tensors = list(leaves((args, kwargs)))
    if not all(plain(tensor) for tensor in tensors):
        return False
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors) <= _MOST_BYTES


def sweep(
    device: torch.device,
    *,
    within_s: float = float("inf"),
    samples: Iterator[tuple[str, Callable[[], Any]]] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Finding]:
    """The findings by overload, for example ``aten.relu.default``; what there was time for.

    A sample that raises is passed over: what it had brought about by then still counts.
    """
    findings: dict[str, Finding] = {}
    ends_s = time.monotonic() + within_s
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, sample in all_samples(device) if samples is None else samples:
            if time.monotonic() > ends_s:
                break
            progress(name)
            with contextlib.suppress(Exception), _Watch(findings):
                _backward(sample())
    return findings


def _backward(result: Any) -> None:
    smooth = [tensor for tensor in leaves(result) if tensor.requires_grad and tensor.dtype.is_floating_point]
    if smooth:
        torch.autograd.backward(smooth, [torch.ones_like(tensor) for tensor in smooth])
