"""Optimizer: whether it is in the middle of a step, and what it had before, if that is to be undone."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from torchlms.eager import private
from torchlms.errors import NotSupported, StepTorn


class OptimizerGuard:
    """Follows the steps of one optimizer by its own hooks.

    With ``snapshot`` each step begins with a copy of parameters and states in host memory, beside every
    budget, and a step that fails for want of memory is undone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, *, snapshot: bool = False) -> None:
        self._optimizer = optimizer
        self._snapshot = snapshot
        self._before: _Snapshot | None = None
        self.inside = False

    def put_on(self, undo: ExitStack) -> None:
        """Hook into the optimizer; ``undo`` gets the opposite.

        One of another make, which has no hooks, is not followed; NotSupported if its steps were to be undone.
        """
        if self._optimizer is None:
            return
        inner: Any = getattr(self._optimizer, "optimizer", self._optimizer)  # of a trainer that wraps it
        try:
            undo.callback(inner.register_step_pre_hook(self._begin).remove)
            undo.callback(inner.register_step_post_hook(self._end).remove)
        except AttributeError:
            if self._snapshot:
                kind = type(inner).__name__
                raise NotSupported(f"snapshot=True: {kind} has no hooks around its steps") from None

    def outside(self) -> None:
        """A forward pass: a step that had begun was given up."""
        self.inside = False
        self._before = None

    def torn(self, error: Exception) -> StepTorn:
        """What to raise instead of ``error``, with which an op of the step has failed."""
        restored = self._before is not None
        if self._before is not None:
            with private.unwatched():
                self._before.restore()
        self.outside()
        return StepTorn(f"optimizer.step() failed half-way: {error}. {_ADVICE[restored]}", restored=restored)

    def _begin(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self.inside = True
        if self._snapshot:
            with private.unwatched():
                self._before = _Snapshot(optimizer)

    def _end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self.outside()


_ADVICE = {
    True: "Parameters and states are again those from before it: run the step once more, or with more budget",
    False: "Some parameters and states are updated and others are not: load the last checkpoint. With "
    "LMS(snapshot=True) the step would have been undone",
}


class _Snapshot:
    """Parameters and states of an optimizer, in host memory."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [
            (parameter, parameter.detach().to("cpu", copy=True))
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        self._states = {
            owner: {name: _copied(item) for name, item in state.items()}
            for owner, state in optimizer.state.items()
        }

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, before in self._parameters:
                parameter.data.copy_(
                    before
                )  # in plain PyTorch, too, the optimizer's writes are not versioned
            states = self._optimizer.state
            for owner in [owner for owner in states if owner not in self._states]:
                del states[owner]
            for owner, before in self._states.items():
                states[owner] = {
                    name: _put_back(states[owner].get(name), item) for name, item in before.items()
                }


def _copied(item: Any) -> Any:
    return item.detach().to("cpu", copy=True) if isinstance(item, torch.Tensor) else item


def _put_back(now: Any, before: Any) -> Any:
    """``before``, in the tensor that is there now, if there is one."""
    if isinstance(now, torch.Tensor) and isinstance(before, torch.Tensor):
        return now.copy_(before)
    return before
