"""Steps of the optimizer that nobody watches: only where nothing can go wrong, and never for longer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchlms.eager.optimizer import OptimizerGuard
from torchlms.eager.timer import OpTimer
from torchlms.memory.device import CpuDevice
from torchlms.memory.ledger import Ledger


class Seen(TorchDispatchMode):
    """Names of the ops that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if not str(func).startswith("profiler."):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def weight() -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    return weight


@pytest.fixture
def optimizer(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.Adam([weight], lr=0.1)


@pytest.fixture
def guard(optimizer: torch.optim.Optimizer) -> Iterator[OptimizerGuard]:
    with ExitStack() as undo:
        guard = OptimizerGuard(optimizer)
        guard.may_look_away = lambda: True
        guard.put_on(undo)
        yield guard


def test_a_step_that_may_run_unseen(guard: OptimizerGuard, optimizer: torch.optim.Optimizer) -> None:
    with Seen() as seen:
        optimizer.step()
        assert seen.names == []
        torch.zeros(1)
        assert seen.names == ["aten.zeros.default"]
        guard.may_look_away = lambda: False
        optimizer.step()
        assert len(seen.names) > 1


def test_a_closure_is_watched(guard: OptimizerGuard, optimizer: torch.optim.Optimizer) -> None:
    with Seen() as seen:
        optimizer.step(lambda: float(torch.ones(1)))
        optimizer.step(closure=lambda: float(torch.ones(1)))
    assert seen.names.count("aten.ones.default") == 2


def test_somebody_elses_mode_sees_everything(guard: OptimizerGuard, optimizer: torch.optim.Optimizer) -> None:
    with Seen() as theirs, Seen():
        optimizer.step()
    assert theirs.names


def test_tensors_with_a_dispatch_of_their_own_are_watched(guard: OptimizerGuard) -> None:
    class Own(torch.nn.Parameter):
        pass

    weight = Own(torch.ones(4))
    weight.grad = torch.ones(4)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with ExitStack() as undo, Seen() as seen:
        other = OptimizerGuard(optimizer)
        other.may_look_away = lambda: True
        other.put_on(undo)
        optimizer.step()
        assert seen.names


def test_a_step_that_is_given_up(
    guard: OptimizerGuard, optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", fail)
    with Seen() as seen:
        with pytest.raises(ValueError, match="on purpose"):
            optimizer.step()
        assert guard.looks_away
        guard.outside()  # as the next forward pass says
        assert not guard.looks_away
        torch.zeros(1)
        assert seen.names == ["aten.zeros.default"]


def test_leaving_ends_it(optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", fail)
    with Seen() as seen:
        with ExitStack() as undo:
            guard = OptimizerGuard(optimizer)
            guard.may_look_away = lambda: True
            guard.put_on(undo)
            with pytest.raises(ValueError, match="on purpose"):
                optimizer.step()
        torch.zeros(1)
        assert seen.names == ["aten.zeros.default"]


def test_the_whole_step_is_timed(guard: OptimizerGuard, optimizer: torch.optim.Optimizer) -> None:
    guard.timer = OpTimer(CpuDevice(Ledger()))
    optimizer.step()
    ((name, seconds),) = guard.timer.times()
    assert name == "optimizer.step"
    assert seconds > 0
