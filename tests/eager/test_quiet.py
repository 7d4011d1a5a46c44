"""Ops that need nothing but an eye on running out of memory: next time they are only run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import torchlms
from torchlms.eager import private
from torchlms.eager.engine import Engine
from torchlms.eager.follower import NEVER
from torchlms.eager.provenance import Provenance

aten = torch.ops.aten
ADD, MUL, ADD_ = aten.add.Tensor, aten.mul.Tensor, aten.add_.Tensor


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """In a backward pass that follows a program of four ops, where, as on a device, nobody counts results."""
    model = torch.nn.Linear(4, 4)
    with torchlms.LMS(model, budget="1GiB", disk_dir=tmp_path, recompute=True) as lms:
        engine = lms._engine
        assert engine is not None
        program = SimpleNamespace(quiet=[None] * 4, leaves_out=lambda clock, name: True)
        engine.now.follower = SimpleNamespace(program=program, due=NEVER, catch_up=_nothing)  # type: ignore[assignment]
        engine.now.plainly = engine.now.backward_seen = True
        engine.now.look_ahead()
        yield engine
        engine.now.follower = None
        engine.now.plainly = False


def _nothing(clock: int) -> None:
    del clock


@pytest.fixture
def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The ops that went the long way."""
    ops: list[Any] = []
    watch = engine.watcher._watch

    def noted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ops.append(func)
        return watch(func, args, kwargs)

    monkeypatch.setattr(engine.watcher, "_watch", noted)
    return ops


def lap(engine: Engine, *ops: Any) -> list[torch.Tensor]:
    engine.now.clock = 0
    with private.unwatched():
        one = torch.ones(2)
        return [engine.watcher.run(func, (one.clone(), one), {}) for func in ops]


def test_what_was_quiet_once_is_only_run(engine: Engine, watched: list[Any]) -> None:
    first = lap(engine, ADD, MUL)
    assert watched == [ADD, MUL]
    second = lap(engine, ADD, MUL)
    assert watched == [ADD, MUL]
    assert engine.now.clock == 2
    assert [tensor.tolist() for tensor in first] == [tensor.tolist() for tensor in second] == [[2, 2], [1, 1]]


def test_another_op_in_its_place_is_watched(engine: Engine, watched: list[Any]) -> None:
    lap(engine, ADD, MUL)
    lap(engine, MUL, MUL)
    assert watched == [ADD, MUL, MUL]


def test_writes_are_always_watched_where_the_program_drops_something(
    engine: Engine, watched: list[Any]
) -> None:
    engine.now.provenance = Provenance(
        device=torch.device("cpu"), kinds=engine.kinds, hold=engine.saver.hold, hollow=engine.saver.hollow
    )
    lap(engine, ADD_)
    lap(engine, ADD_)
    assert watched == [ADD_, ADD_]
    engine.now.provenance = None
    lap(engine, ADD_)
    lap(engine, ADD_)
    assert watched == [ADD_] * 3


def test_nothing_is_quiet_while_the_graph_of_another_program_has_dropped_something(
    engine: Engine, watched: list[Any]
) -> None:
    lap(engine, ADD_, MUL)
    engine.dropped.add(-1)
    lap(engine, ADD_, MUL)
    engine.dropped.clear()
    assert watched == [ADD_, MUL] * 2


def test_what_is_due_is_done_first(engine: Engine, watched: list[Any]) -> None:
    lap(engine, ADD, MUL, ADD)
    due = []
    assert engine.now.follower is not None
    engine.now.follower.due = 1
    engine.now.follower.catch_up = due.append  # type: ignore[method-assign]
    engine.now.look_ahead()
    del watched[:]
    lap(engine, ADD, MUL, ADD)
    assert due == [1, 2]  # ``due`` stays what it was
    assert watched == [MUL, ADD]


def test_the_optimizers_ops_are_watched(engine: Engine, watched: list[Any]) -> None:
    lap(engine, ADD)
    engine.guard.inside = True
    lap(engine, ADD, MUL)
    engine.guard.inside = False
    lap(engine, MUL, MUL)
    assert watched == [ADD, ADD, MUL, MUL, MUL]


def test_orphans_are_buried_first(engine: Engine, watched: list[Any]) -> None:
    lap(engine, ADD)
    buried = []
    engine.orphans = deque([SimpleNamespace(bury=lambda: buried.append(1))])  # type: ignore[list-item]
    lap(engine, ADD)
    assert buried == [1]
    assert watched == [ADD, ADD]


def test_a_strayed_step_is_watched(engine: Engine, watched: list[Any]) -> None:
    lap(engine, ADD)
    engine.now.follower = None
    engine.now.look_ahead()
    lap(engine, ADD)
    assert watched == [ADD, ADD]


def test_running_out_is_survived(engine: Engine, watched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lap(engine, ADD)
    monkeypatch.setattr(engine.ladder, "retry", lambda func, args, *rest: ("again", func, rest[-1]))

    def fails(*args: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 MiB.")

    engine.now.quiet[0] = fails
    engine.now.clock = 0
    assert engine.watcher.run(fails, (), {}) == ("again", fails, (2 << 20) + 1)
    assert watched == [ADD]
    assert engine.now.clock == 1
