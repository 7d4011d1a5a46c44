"""Case: one forward and backward pass that somebody else thought of, and how it is made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SEED = 1234


@dataclass(frozen=True, slots=True)
class Subject:
    """What a case runs on, made anew for each run.

    ``forward`` returns results, nested as it likes, and keeps none of them. ``leaves`` are what gradients
    are asked of, ``watched`` what is compared besides: the module's buffers, or inputs without gradient.
    ``after`` follows each backward pass: an optimizer, if there is one.
    """

    forward: Callable[[], Any]
    leaves: dict[str, Tensor]
    watched: dict[str, Tensor] = field(default_factory=dict)
    model: nn.Module | None = None
    after: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Case:
    """A name that finds it again, and a function that makes its subject, the same one each time."""

    name: str
    make: Callable[[], Subject]


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that are made together, for example all samples of one operator in one type."""

    name: str
    cases: Callable[[], Iterator[Case]]


class Tensors:
    """Stand-ins for tensors nested in arguments; what is one tensor there is one tensor here."""

    def __init__(self, stand_in: Callable[[Tensor], Tensor]) -> None:
        self._stand_in = stand_in
        self._made: dict[int, Tensor] = {}

    def of(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            if id(item) not in self._made:
                self._made[id(item)] = self._stand_in(item)
            return self._made[id(item)]
        if type(item) in (list, tuple):
            return type(item)(self.of(part) for part in item)
        if type(item) is dict:
            return {name: self.of(part) for name, part in item.items()}
        return item


def own(item: Any) -> Any:
    """``item`` with leaves in place of its tensors: some samples come with a graph that made them."""
    return Tensors(lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad)).of(item)


def passing(item: Any) -> Any:
    """``item`` with differentiable copies of its tensors, which nobody but the graph refers to once the
    op has run: so they may leave."""
    return Tensors(Tensor.clone).of(item)


def named_tensors(item: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested arguments or results, each with the way to it."""
    if isinstance(item, Tensor):
        yield name, item
    elif isinstance(item, (list, tuple)):
        for index, part in enumerate(item):
            yield from named_tensors(part, f"{name}[{index}]")
    elif isinstance(item, dict):
        for key, part in item.items():
            yield from named_tensors(part, f"{name}.{key}")


def subject_of(function: Callable[..., Any], args: Any, kwargs: Any, model: nn.Module | None) -> Subject:
    """``function(*args, **kwargs)``, whose parameters and buffers, if it has some, are those of ``model``."""
    given = own({"args": tuple(args), "kwargs": dict(kwargs)})

    def forward() -> Any:
        copies = passing(given)
        return function(*copies["args"], **copies["kwargs"])

    inputs = dict(named_tensors(given))
    if model is not None:
        inputs |= dict(model.named_parameters()) | dict(model.named_buffers())
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    watched = {name: tensor for name, tensor in inputs.items() if not tensor.requires_grad}
    return Subject(forward, leaves, watched, model)


def seed() -> None:
    """Every generator that a case may draw from, set to the same place."""
    import random

    import numpy as np

    torch.default_generator.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)
