"""Optimizer: whether it is in the middle of a step, and what it had before, if that is to be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from torchlms.eager import private
from torchlms.errors import NotSupported, StepTorn
from torchlms.memory.limits import format_bytes

if TYPE_CHECKING:
    from torchlms.eager.timer import OpTimer


class OptimizerGuard:
    """Follows the steps of one optimizer by its own hooks.

    With ``snapshot`` each step begins with a copy of parameters and states in host memory, beside every
    budget, and a step that fails for want of memory is undone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, *, snapshot: bool = False) -> None:
        self._optimizer = optimizer
        self._snapshot = snapshot
        self._before: _Snapshot | None = None
        self._makes_states: torch.optim.Optimizer | None = None  # whose first step this is
        self.inside = False
        self.steps = 0  # that have ended
        self.may_look_away: Callable[[], bool] = _never
        self.timer: OpTimer | None = None
        self._unwatched: Any = None  # the context in which a step runs that nobody needs to watch

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
            undo.callback(self.look_again)
        except AttributeError:
            if self._snapshot:
                kind = type(inner).__name__
                raise NotSupported(f"snapshot=True: {kind} has no hooks around its steps") from None

    def outside(self) -> None:
        """A forward pass: a step that had begun was given up."""
        self.look_again()
        self.inside = False
        self._before = self._makes_states = None

    @property
    def looks_away(self) -> bool:
        """Whether a step runs, or was given up, that nobody watches."""
        return self._unwatched is not None

    def look_again(self) -> None:
        """Watch ops again; must not be called from within another such context."""
        unwatched, self._unwatched = self._unwatched, None
        if unwatched is not None:
            unwatched.__exit__(None, None, None)

    def torn(self, error: Exception) -> StepTorn:
        """What to raise instead of ``error``, with which an op of the step has failed."""
        restored = self._before is not None
        advice = _ADVICE[restored]
        smallest_bytes: int = getattr(error, "smallest_bytes", 0)
        if self._makes_states is not None:
            states_bytes = _states_to_come_bytes(self._makes_states)
            advice += _FIRST.format(states=format_bytes(states_bytes))
            if smallest_bytes:
                smallest_bytes += states_bytes
                advice += f": try {format_bytes(smallest_bytes, up=True)} ({smallest_bytes} bytes)"
        if self._before is not None:
            with private.unwatched():
                self._before.restore()
        self.outside()
        return StepTorn(
            f"optimizer.step() failed half-way: {error}. {advice}",
            restored=restored,
            smallest_bytes=smallest_bytes,
        )

    def _begin(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.inside = True
        self._makes_states = optimizer if not optimizer.state else None
        if self._snapshot:
            with private.unwatched():
                self._before = _Snapshot(optimizer)
        # Many small ops, each of which costs more to watch than to run.
        if not _calls_back(args, kwargs) and self.may_look_away() and _is_plain(optimizer):
            if self.timer is not None:
                self.timer.begin()
            self._unwatched = private.unwatched()
            self._unwatched.__enter__()

    def _end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        if self.looks_away and self.timer is not None:
            self.timer.end(_WHOLE_STEP)
        self.steps += 1
        self.outside()


_WHOLE_STEP = "optimizer.step"


def _calls_back(args: Any, kwargs: Any) -> bool:
    """Whether the step is given a closure, which runs forward and backward passes."""
    return any(callable(item) for item in (*args[1:], *kwargs.values()))


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether nothing else wants to see its ops: tensors with a dispatch of their own would not."""
    if not private.sole_dispatch_mode():
        return False
    states = (item for state in optimizer.state.values() for item in state.values())
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    known = (torch.Tensor, torch.nn.Parameter)
    return all(type(item) in known for item in (*parameters, *states) if isinstance(item, torch.Tensor))


def _never() -> bool:
    return False


_ADVICE = {
    True: "Parameters and states are again those from before it: run the step once more, or with more budget",
    False: "Some parameters and states are updated and others are not: load the last checkpoint. With "
    "LMS(snapshot=True) the step would have been undone",
}


_FIRST = (
    ". It was the optimizer's first step, which makes its states: the budget has to hold them beside "
    "parameters and gradients, and about {states} of them were still to be made"
)


def _states_to_come_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What a first step that failed would still have made: as much for each byte of parameters as it had made
    for those whose states are whole. Before there are any: two copies, as Adam has, where it had begun with
    the first one's, else one, as momentum is."""
    updated = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    begun = [parameter for parameter in updated if optimizer.state.get(parameter)]
    whole = begun[:-1]  # memory may have run out in the middle of the last one's
    made_bytes = _bytes_of(item for parameter in whole for item in optimizer.state[parameter].values())
    whole_bytes = _bytes_of(whole)
    rate = made_bytes / whole_bytes if whole else 2.0 if begun else 1.0
    return int(rate * (_bytes_of(updated) - whole_bytes))


def _bytes_of(items: Iterable[Any]) -> int:
    return sum(item.untyped_storage().nbytes() for item in items if isinstance(item, torch.Tensor))


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
