"""Aside: when LMS leaves a loop alone, and what brings it back. Engine and hooks are feigned."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torchlms.eager.aside import Aside, ForwardHook


class Feigned:
    """What Aside asks of engine and installation, and what it was told."""

    def __init__(self) -> None:
        self.dead = False
        self.device = SimpleNamespace(is_cuda=True)
        self.routines = SimpleNamespace(all_fit=lambda: self.fits, doubt=lambda: self.told.append("doubt"))
        self.collector = SimpleNamespace(look_now=lambda: None)
        self.starved_aside = False
        self.fits = True
        self.tight = False
        self.on = True
        self.told: list[str] = []

    def settle(self) -> None:
        self.told.append("settle")

    def leave_alone(self) -> None:
        self.told.append("leave alone")

    def failed_alone(self) -> bool:
        return self.starved_aside

    def outgrown(self) -> bool:
        return self.tight

    def on_top(self) -> bool:
        return True

    def put_on(self) -> None:
        self.on = True

    def take_off(self) -> None:
        self.on = False


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(4, 4)


@pytest.fixture
def feigned() -> Feigned:
    return Feigned()


@pytest.fixture
def aside(feigned: Feigned, model: nn.Module) -> Iterator[Aside]:
    made = Aside(feigned, feigned)  # type: ignore[arg-type]
    with ExitStack() as undo:
        made.listen(model, undo)
        yield made
    assert not model._forward_pre_hooks


def rows(count: int) -> torch.Tensor:
    return torch.ones(count, 4)


def test_it_goes_where_everything_fits_and_comes_back_for_larger_inputs(
    aside: Aside, feigned: Feigned, model: nn.Module
) -> None:
    feigned.fits = False
    model(rows(8))
    assert feigned.on
    feigned.fits = True
    model(rows(8))
    assert aside.on
    assert not feigned.on
    assert feigned.told == ["settle", "settle", "leave alone"]
    model(rows(8))
    model(rows(2))
    assert aside.on, "nothing larger than before"
    model(rows(16))
    assert not aside.on
    assert feigned.on
    assert "doubt" not in feigned.told, "plans for smaller inputs are as good as they were"


def test_it_comes_back_when_memory_has_become_tight(aside: Aside, feigned: Feigned, model: nn.Module) -> None:
    model(rows(8))
    assert aside.on
    feigned.tight = True
    model(rows(8))
    assert not aside.on
    assert feigned.told[-1] == "doubt"
    model(rows(8))
    assert feigned.on, "and does not go again"


def test_it_does_not_come_back_inside_of_inference_mode(
    aside: Aside, feigned: Feigned, model: nn.Module
) -> None:
    """A mode put on there would be taken away with it."""
    model(rows(8))
    with torch.inference_mode():
        model(rows(16))
        assert aside.on
    with torch.no_grad():
        model(rows(16))
    assert not aside.on


def test_it_does_not_go_where_sizes_cannot_be_seen_or_nothing_is_saved(
    aside: Aside, feigned: Feigned, model: nn.Module
) -> None:
    with torch.no_grad():
        model(rows(8))
    assert feigned.told == []
    model.forward = lambda batch: None  # type: ignore[method-assign]
    model(object())
    assert feigned.on
    feigned.dead = True
    model(rows(8))
    assert feigned.on


def test_its_end_puts_everything_on_again(aside: Aside, feigned: Feigned, model: nn.Module) -> None:
    aside.end()
    feigned.on = False
    aside.end()
    assert not feigned.on, "it was not aside, and so it is not its to put on"
    feigned.on = True
    model(rows(8))
    aside.end()
    assert feigned.on
    assert not aside.on


def test_a_copy_of_a_watched_model_tells_nobody(model: nn.Module) -> None:
    told: list[Any] = []
    model.register_forward_pre_hook(ForwardHook(lambda *arguments: told.append(arguments)), with_kwargs=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(rows(1))
        assert told == []
    model(rows(1))
    assert len(told) == 1
    assert b"torchlms" not in pickle.dumps(model), "a file with the model is read without this package"
