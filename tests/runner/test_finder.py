"""The parts of finding, in this process: what is found is known, and no hook stays behind."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchlms.api
from torchlms.core.machine import Machine
from torchlms.eager.aside import Aside
from torchlms.runner.finder import Finder
from torchlms.runner.found import Models, Optimizers
from torchlms.runner.script_lms import ScriptLMS


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Machine("cpu", 16 << 30, torch.__version__, disk_write_bytes_per_s=1e9, disk_read_bytes_per_s=1e9)
    monkeypatch.setattr(torchlms.api, "measured_machine", lambda *_, **__: made)


@pytest.fixture
def options(spill_dir: Path) -> dict[str, Any]:
    return {"budget": "1GiB", "disk_dir": spill_dir}


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(32, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def is_looking() -> bool:
    return bool(torch.nn.modules.module._global_forward_pre_hooks)


def test_models_are_one() -> None:
    models, first, second = Models(), make(), make()
    models.add(first)
    assert dict(models.named_modules()) == dict(first.named_modules())
    models.add(second)
    models.add(first)
    names = [name for name, _ in models.named_modules()]
    assert names == ["", "0", "1", "2", "2.0", "2.1"] + [
        "Sequential", "Sequential.0", "Sequential.1", "Sequential.2", "Sequential.2.0", "Sequential.2.1",
    ]  # fmt: skip
    assert list(models.parameters()) == [*first.parameters(), *second.parameters()]
    assert list(models.buffers()) == [*first.buffers(), *second.buffers()]


def test_optimizers_are_one() -> None:
    optimizers, models = Optimizers(), (make(), make())
    made = [torch.optim.Adam(model.parameters()) for model in models]
    assert [optimizers.add(optimizer) for optimizer in (*made, *made)] == [True, True, False, False]
    for model, optimizer in zip(models, made, strict=True):
        step(model, optimizer)
    assert len(optimizers.param_groups) == 2
    assert set(optimizers.state) == {parameter for model in models for parameter in model.parameters()}


def test_found_things_are_not_kept_alive() -> None:
    models, optimizers, model = Models(), Optimizers(), make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    models.add(model)
    optimizers.add(optimizer)
    watched = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert watched() is None
    assert (list(models.parameters()), optimizers.param_groups, optimizers.state) == ([], [], {})


def test_looking_ends_after_one_round_and_begins_with_a_new_optimizer(options: dict[str, Any]) -> None:
    filters = list(warnings.filters)
    finder = Finder(options, None)
    try:
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for looking in (True, False, False):
            step(model, optimizer)
            assert is_looking() == looking
        assert list(warnings.filters) == filters
        other = torch.optim.SGD(model.parameters(), 0.1)
        for looking in (True, True, False):
            step(model, other)
            assert is_looking() == looking
        assert finder.lms is not None
        assert finder.lms.state in ("record", "guard")
    finally:
        finder.end()
    assert not is_looking()
    assert list(warnings.filters) == filters


def test_looking_ends_without_an_optimizer_that_torch_knows(options: dict[str, Any]) -> None:
    finder = Finder(options, None)
    try:
        model = make()
        for _ in range(80):
            model(torch.randn(4, 64)).sum().backward()
        assert not is_looking()
    finally:
        finder.end()


def test_a_lazy_model_is_taken_once_its_shapes_are_known(options: dict[str, Any]) -> None:
    finder = Finder(options, None)
    try:
        model = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64), nn.LazyLinear(64))
        model(torch.randn(4, 32))
        assert finder.lms is None
        model(torch.randn(4, 32)).sum().backward()
        assert finder.lms is not None
    finally:
        finder.end()


def test_only_the_device_asked_for(options: dict[str, Any]) -> None:
    finder = Finder(options, "cuda:0")
    try:
        make()(torch.randn(4, 64)).sum().backward()
        assert finder.lms is None
    finally:
        finder.end()


def test_a_model_met_later_tells_of_its_forward_passes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card, where LMS steps aside and comes back at them; and not after the end."""
    told: list[nn.Module] = []
    monkeypatch.setattr(Aside, "_before_forward", lambda self, module, args, kwargs: told.append(module))
    models, first, second, third = Models(), make(), make(), make()
    lms = ScriptLMS(models, Optimizers(), gave_way=lambda: None, **options)
    lms._aside = Aside(None, None)  # type: ignore[arg-type]
    lms.take_in(first, listen=True)
    lms.take_in(second, listen=True)
    lms.take_in(third, listen=False)
    for model in (first, second, third):
        model(torch.randn(4, 64))
    assert told == [first, second]
    lms._undo.close()
    first(torch.randn(4, 64))
    assert told == [first, second]
    lms._kinds.unlabel()
