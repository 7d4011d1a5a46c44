"""Found: the models and the optimizers that a script has shown so far, each seen as one.

Neither keeps anything alive: a script that is done with a model gets its memory back.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

StepHook = Callable[[torch.optim.Optimizer, Any, Any], None]


class Models(torch.nn.Module):
    """Has the parameters, buffers and modules of every model in it, present and to come; is never called.

    The modules of the first model go by their own names, those of others after the name of their class.
    """

    def __init__(self) -> None:
        super().__init__()
        self._models: list[weakref.ref[torch.nn.Module]] = []

    def add(self, model: torch.nn.Module) -> None:
        if not any(known is model for known in self.living()):
            self._models.append(weakref.ref(model))

    def living(self) -> Iterator[torch.nn.Module]:
        for reference in self._models:
            model = reference()
            if model is not None:
                yield model

    def named_modules(
        self, memo: set[torch.nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """Of all models; torch's ``parameters()`` and ``buffers()`` are built on this."""
        memo = set() if memo is None else memo
        for index, model in enumerate(self.living()):
            name = f"{prefix}{type(model).__name__}" if index else prefix
            yield from model.named_modules(memo, name, remove_duplicate)


class Optimizers:
    """The parameter groups and the states of every optimizer in it, and their steps, told by ``begin`` and
    ``end``. Of an optimizer that has another one take its step only the outer step is passed on."""

    def __init__(self) -> None:
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._stepping: weakref.ref[torch.optim.Optimizer] | None = None
        self._before: OrderedDict[int, StepHook] = OrderedDict()
        self._after: OrderedDict[int, StepHook] = OrderedDict()

    def add(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether ``optimizer`` is new."""
        new = optimizer not in self._optimizers
        self._optimizers.add(optimizer)
        return new

    def register_step_pre_hook(self, hook: StepHook) -> RemovableHandle:
        """As that of an optimizer, for all of them."""
        return _registered(self._before, hook)

    def register_step_post_hook(self, hook: StepHook) -> RemovableHandle:
        """As that of an optimizer, for all of them."""
        return _registered(self._after, hook)

    def begin(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A step begins. One that was begun before by this optimizer and never ended has failed."""
        outer = self._stepping() if self._stepping is not None else None
        if outer is None or outer is optimizer:
            self._stepping = weakref.ref(optimizer)
            for hook in list(self._before.values()):
                hook(optimizer, args, kwargs)

    def end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """A step has ended."""
        if self._stepping is not None and self._stepping() is optimizer:
            self._stepping = None
            for hook in list(self._after.values()):
                hook(optimizer, args, kwargs)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        return {key: state for optimizer in self._optimizers for key, state in optimizer.state.items()}


def _registered(hooks: OrderedDict[int, StepHook], hook: StepHook) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
