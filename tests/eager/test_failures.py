"""Exceptions and Ctrl-C anywhere: the loop goes on, in the same LMS or in a new one, with plain's bits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sessions import (
    Session,
    more,
    moved_bytes,
    new_session,
    open_lms,
    outcome,
)
from small_networks import NETWORKS
from torch import Tensor, nn

import torchlms

MLP = NETWORKS["mlp"]
BUDGET = 800_000  # of 1.7 MB
PLACES = ["forward", "backward", "between"]


@contextmanager
def failing(session: Session, place: str, error: type[BaseException]) -> Iterator[None]:
    """Inside, the model's forward or backward pass raises half-way."""
    layers = session.model.layers
    assert isinstance(layers, nn.Sequential)
    middle = layers[15]

    def fail(*_: Any) -> None:
        raise error("on purpose")

    handles = []
    if place == "forward":
        handles.append(middle.register_forward_hook(fail))
    elif place == "backward":
        handles.append(middle.weight.register_hook(fail))  # type: ignore[union-attr,operator]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def step_that_may_fail(session: Session, step: int, fails: bool, place: str, error: type) -> None:
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    with failing(session, place if fails else "", error):
        loss = F.cross_entropy(session.model(inputs), target)
        if fails and place == "between":
            raise error("on purpose")
        loss.backward()
    session.optimizer.step()
    session.note(loss)


def train(session: Session, steps: range, failures: set[int], place: str, error: type) -> None:
    """Steps that fail are given up, as a program would that skips a bad batch."""
    for step in steps:
        if step in failures:
            with pytest.raises(error, match="on purpose"):
                step_that_may_fail(session, step, True, place, error)
        else:
            step_that_may_fail(session, step, False, place, error)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        *((place, ValueError) for place in PLACES),
        ("backward", KeyboardInterrupt),
        more("forward", KeyboardInterrupt),
        more("between", KeyboardInterrupt),
    ],
)
def test_the_loop_goes_on_in_the_same_lms(place: str, error: type, spill_dir: Path) -> None:
    """The first step fails, while it is recorded; so do one that is timed and one that follows its plan."""
    plain, session = new_session(MLP), new_session(MLP)
    failures = {0, 3, 7}
    train(plain, range(10), failures, place, error)
    expected = outcome(plain)
    torch.manual_seed(1234)
    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir) as lms:
        train(session, range(10), failures, place, error)
        stats = lms.stats()
    assert outcome(session).differences(expected) == []
    assert stats["bytes_out_per_step"] > 0
    assert stats["peak_device_bytes"] <= BUDGET
    assert stats["state"] == "guard"


@pytest.mark.parametrize("error", [ValueError, more(KeyboardInterrupt)])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", [0, 2, 5])
def test_the_loop_goes_on_in_a_new_lms(when: int, place: str, error: type, spill_dir: Path) -> None:
    plain = new_session(MLP)
    train(plain, range(8), {when}, place, error)
    expected = outcome(plain)
    session = new_session(MLP)
    lms = torchlms.LMS(
        session.model, session.optimizer, budget=BUDGET, disk_dir=spill_dir, rules={"min_bytes": 1024}
    )
    with pytest.raises(error, match="on purpose"), lms:
        train_until_failure(session, when, place, error)
    assert_nothing_left(session, lms, spill_dir)
    with open_lms(session, BUDGET, spill_dir) as lms:
        train(session, range(when + 1, 8), set(), place, error)
        assert moved_bytes(lms) > 0
    assert outcome(session).differences(expected) == []
    assert_nothing_left(session, lms, spill_dir)


def train_until_failure(session: Session, when: int, place: str, error: type) -> None:
    for step in range(when + 1):
        step_that_may_fail(session, step, step == when, place, error)


def assert_nothing_left(session: Session, lms: torchlms.LMS, spill_dir: Path) -> None:
    """Beside what the leak check after each test looks for."""
    assert list(spill_dir.iterdir()) == []
    assert lms.state == "off"
    assert not session.model._forward_pre_hooks
    tensors = [*session.model.parameters(), *session.model.buffers()]
    tensors += [parameter.grad for parameter in session.model.parameters() if parameter.grad is not None]
    states = [item for state in session.optimizer.state.values() for item in state.values()]
    tensors += [item for item in states if isinstance(item, Tensor)]
    marks = {name for tensor in tensors for name in vars(tensor.untyped_storage())}
    assert marks == set()
    # Autograd may keep a graph whose backward pass failed until its next one.
    torch.ones(1, requires_grad=True).sum().backward()
    gc.collect()
    assert list(lms._engine.living()) == []  # type: ignore[union-attr]


@pytest.mark.parametrize("cut", [1, 4, 7, 10])
def test_a_graph_dropped_after_the_end_leaves_nothing_with_lms(cut: int, spill_dir: Path) -> None:
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.GELU())))
    lms = torchlms.LMS(model, budget=500_000, disk_dir=spill_dir, rules={"min_bytes": 1024})
    with lms:
        for _ in range(6):
            model(torch.randn(256, 32)).square().mean().backward()
            model.zero_grad()
        alive = model[:cut](torch.randn(256, 32))
    del alive
    gc.collect()
    assert lms._engine is not None
    assert [orphan for orphan in lms._engine.orphans if orphan.bytes is not None] == []
