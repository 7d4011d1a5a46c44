"""Labels: which module is running, told from the stack."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from torchlms.eager import private
from torchlms.eager.labels import ModuleLabels

SEEN: list[str] = []


def look(labels: ModuleLabels) -> None:
    SEEN.append(labels.here())


class Usual(nn.Module):
    def forward(self, labels: ModuleLabels) -> None:
        look(labels)


class Short(nn.Module):
    """Whose author writes as little as possible."""

    def forward(s, labels: ModuleLabels) -> None:  # noqa: N805
        look(labels)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Usual(), Short(), Short()])
        self.inner[2].forward = types.MethodType(elsewhere, self.inner[2])  # type: ignore[method-assign]

    def forward(self, labels: ModuleLabels) -> None:
        for module in self.inner:
            module(labels)
        self.inner[0].forward(labels)  # not called as a module
        look(labels)


def elsewhere(module: nn.Module, labels: ModuleLabels) -> None:
    look(labels)


def test_the_innermost_module_whatever_its_author_calls_things() -> None:
    SEEN.clear()
    model = Outer()
    labels = ModuleLabels(model)
    model(labels)
    look(labels)
    assert SEEN == ["inner.0", "inner.1", "inner.2", "inner.0", "", ""]
    model.inner[1] = Usual()
    SEEN.clear()
    model.inner[1](labels)
    assert SEEN == ["Usual"], "a module that came later goes by its type"


def test_hooks_of_a_module_are_its_own() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    labels = ModuleLabels(model)
    found: list[str] = []

    def hook(module: nn.Module, args: Any, result: Tensor) -> None:
        found.append(labels.here())

    model[1].register_forward_hook(hook)
    model(torch.zeros(1))
    assert found == ["1"]


def test_torch_calls_every_module_by_the_function_that_we_look_for() -> None:
    assert private.module_call() is nn.Module._call_impl.__code__  # type: ignore[attr-defined]
