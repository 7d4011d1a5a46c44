"""Exceptions and Ctrl-C anywhere: the loop goes on, in the same LMS or in a new one, with plain's bits."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import NETWORKS
from torch import Tensor, nn
from training import (
    Session,
    moved_bytes,
    new_session,
    open_lms,
    outcome,
    plain_peak,
    plain_step,
    run_plain,
)

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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
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
        for step in range(when + 1):
            step_that_may_fail(session, step, step == when, place, error)
    assert_nothing_left(session, lms, spill_dir)
    with open_lms(session, BUDGET, spill_dir) as lms:
        train(session, range(when + 1, 8), set(), place, error)
        assert moved_bytes(lms) > 0
    assert outcome(session).differences(expected) == []
    assert_nothing_left(session, lms, spill_dir)


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


FILES = ("/torchlms/eager/", "/torchlms/memory/store.py", "/torchlms/director.py")


class Interrupt:
    """Ctrl-C as the interpreter delivers it: before some line of this package, the ``at``-th one."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.lines = 0

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not any(part in frame.f_code.co_filename for part in FILES):
            return None
        if event == "line" and frame.f_code.co_name != "__del__":
            self.lines += 1
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt("on purpose")
        return self.trace


def count_lines(spill_dir: Path) -> int:
    return run_interrupted(1 << 60, spill_dir)


def run_interrupted(at: int, spill_dir: Path) -> int:
    session = new_session(MLP)
    interrupt = Interrupt(at)
    with open_lms(session, BUDGET, spill_dir):
        before = sys.gettrace()
        sys.settrace(interrupt.trace)
        try:
            for step in range(6):
                plain_step(session, step)
        finally:
            sys.settrace(before)
    return interrupt.lines


@pytest.mark.parametrize("share", [0.02, 0.11, 0.19, 0.28, 0.37, 0.46, 0.55, 0.64, 0.73, 0.82, 0.91, 0.99])
def test_an_interrupt_anywhere_in_the_package(share: float, spill_dir: Path) -> None:
    lines = _lines.setdefault("all", count_lines(spill_dir) if "all" not in _lines else 0)
    for nudge in range(4):
        with pytest.raises(KeyboardInterrupt, match="on purpose"):
            run_interrupted(int(share * lines) + 97 * nudge, spill_dir)
        assert list(spill_dir.iterdir()) == []
    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir):
        for step in range(6):
            plain_step(session, step)
    assert outcome(session).differences(run_plain(MLP)) == []


_lines: dict[str, int] = {}


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
@pytest.mark.parametrize("after", [3, 60])
def test_a_disk_that_fails(call: str, after: int, spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear error; what the last finished step left is intact, and training goes on elsewhere."""
    real, calls = getattr(os, call), iter(range(1 << 30))

    def failing_call(*args: Any) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC if call == "pwrite" else errno.EIO, "on purpose")
        return int(real(*args))

    session = new_session(MLP)
    finished = 0
    with pytest.raises(torchlms.SpillError) as raised, open_lms(session, BUDGET, spill_dir):
        monkeypatch.setattr(os, call, failing_call)
        for step in range(6):
            before = torch.get_rng_state()
            plain_step(session, step)
            finished = step + 1
    monkeypatch.undo()
    assert raised.value.errno == (errno.ENOSPC if call == "pwrite" else errno.EIO)
    assert "on purpose" in str(raised.value)
    assert isinstance(raised.value, OSError)
    assert finished == (0 if after == 3 else finished)
    assert finished < 6
    session.optimizer.zero_grad()
    torch.set_rng_state(before)
    expected = run_plain(MLP, plain_step, 6)
    with open_lms(session, plain_peak(MLP) // 2, spill_dir):
        for step in range(finished, 6):
            plain_step(session, step)
    assert outcome(session).differences(expected) == []
