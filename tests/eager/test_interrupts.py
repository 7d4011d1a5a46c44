"""Ctrl-C between any two lines of this package: out at once, nothing left, and a new LMS works."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from sessions import more, moved_bytes, new_session, open_lms, outcome, plain_peak, plain_step, run_plain
from small_networks import NETWORKS, Perceptron

import torchlms
from torchlms.eager import private

NETWORK = replace(NETWORKS["mlp"], name="short", make_model=partial(Perceptron, layers=4), batch_size=128)
STEPS = 4  # recorded, timed, timed, planned
POINTS = 16
FILES = ("/torchlms/eager/", "/torchlms/memory/store.py", "/torchlms/director.py", "/torchlms/referee.py")


class Interrupt:
    """Ctrl-C as the interpreter delivers it, before the ``at``-th line of this package.

    Not in finalizers, where an exception is printed and goes no further.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.lines = 0

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_name == "__del__" or not any(part in code.co_filename for part in FILES):
            return None
        if event == "line":
            self.lines += 1
            if self.lines >= self.at and not _in_finalizer(frame):
                raise KeyboardInterrupt("on purpose")
        return self.trace


def _in_finalizer(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def train(spill_dir: Path, interrupt: Interrupt) -> int:
    """Returns how many bytes moved."""
    session = new_session(NETWORK)
    with open_lms(session, plain_peak(NETWORK) // 2, spill_dir) as lms:
        before = sys.gettrace()
        sys.settrace(interrupt.trace)
        try:
            for step in range(STEPS):
                plain_step(session, step)
        finally:
            sys.settrace(before)
        return moved_bytes(lms)


_LINES: list[int] = []


@pytest.fixture
def lines(tmp_path: Path) -> int:
    """How many lines of this package run in all, under the same fixtures as the tests."""
    if not _LINES:
        plain_peak(NETWORK)
        for _ in range(2):  # the first time more is worked out that is known from then on
            interrupt = Interrupt(1 << 60)
            assert train(tmp_path, interrupt) > 0
        _LINES.append(interrupt.lines)
    return _LINES[0]


@pytest.mark.parametrize("point", [more(point) if point % 3 else point for point in range(POINTS)])
def test_an_interrupt_anywhere(point: int, lines: int, spill_dir: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="on purpose"):
        train(spill_dir, Interrupt(1 + (2 * point + 1) * lines // (2 * POINTS)))
    assert list(spill_dir.iterdir()) == []
    session = new_session(NETWORK)
    with open_lms(session, plain_peak(NETWORK) // 2, spill_dir):
        for step in range(STEPS):
            plain_step(session, step)
    assert outcome(session).differences(run_plain(NETWORK, plain_step, STEPS)) == []


class CtrlC:
    """The signal itself, before the ``at``-th line of this package; once."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.lines = 0

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if "/torchlms/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at and not _in_finalizer(frame):
                signal.raise_signal(signal.SIGINT)
        return self.trace


def enter_and_leave(spill_dir: Path, ctrl_c: CtrlC) -> None:
    session = new_session(NETWORK)
    sys.settrace(ctrl_c.trace)
    try:
        with open_lms(session, 1 << 30, spill_dir):
            pass
    finally:
        sys.settrace(None)


def standing() -> tuple[Any, ...]:
    """What LMS changes for as long as it is on."""
    return (
        gc.get_freeze_count() > len(gc.get_objects()),
        gc.get_threshold(),
        private.top_dispatch_mode(),
        private.top_saved_tensor_hooks(),
        torchlms.current(),
        signal.getsignal(signal.SIGINT),
    )


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """As in a program; what runs tests side by side has its workers ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), more(7), 61])
def test_nothing_stays_when_entering_or_leaving_is_interrupted(
    stride: int, spill_dir: Path, ctrl_c_raises: None
) -> None:
    for _ in range(2):  # the first time more is imported and worked out
        count = CtrlC(-1)
        enter_and_leave(spill_dir, count)
    before = standing()
    assert count.lines > 300
    raised = 0
    points = range(1, count.lines, stride)
    for at in points:
        try:
            enter_and_leave(spill_dir, CtrlC(at))
        except KeyboardInterrupt:  # not where a finalizer runs, whose errors go no further
            raised += 1
        assert standing() == before, at
    assert raised > 0.9 * len(points)
    with open_lms(new_session(NETWORK), 1 << 30, spill_dir) as lms:
        assert torchlms.current() is lms
