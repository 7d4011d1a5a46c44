"""Killed in any phase, beside a process that shares the disk directory: it takes nothing with it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eager"))

from sessions import Session, new_session, open_lms, outcome, plain_step, run_plain
from small_networks import NETWORKS

from torchlms.memory.disk import SpillFile

MLP = NETWORKS["mlp"]
BUDGET = 800_000  # of 1.7 MB
STEPS = 6
WAIT_S = 60
Die = Callable[[], None]

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_forward(session: Session, die: Die) -> None:
    *_, last = session.model.children()
    last.register_forward_pre_hook(lambda *_: die())


def in_backward(session: Session, die: Die) -> None:
    first = next(session.model.children())

    def in_its_gradient(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.register_hook(lambda _: die())

    first.register_forward_hook(in_its_gradient)


def in_the_optimizer(session: Session, die: Die) -> None:
    session.optimizer.register_step_pre_hook(lambda *_: die())


def in_the_data(session: Session, die: Die) -> None:
    del session
    die()


@pytest.mark.parametrize("phase", [in_forward, in_backward, in_the_optimizer, in_the_data])
@pytest.mark.parametrize("step", [0, 4], ids=["recorded", "planned"])
def test_a_killed_process_takes_nothing_with_it(
    phase: Callable[[Session, Die], None], step: int, spill_dir: Path
) -> None:
    victim = Victim(phase, step, spill_dir)
    survivor = new_session(MLP)
    with open_lms(survivor, BUDGET, spill_dir) as lms:
        for number in range(STEPS):
            if number == STEPS // 2:
                victim.ready()
                theirs = set(spill_dir.iterdir())
                assert len(theirs) == 2 or step == 0, "a directory each, once values have moved"
                victim.killed()
                assert set(spill_dir.iterdir()) == theirs, "only the next start cleans up"
            plain_step(survivor, number)
        assert lms.stats()["bytes_out_per_step"] > 0
    assert outcome(survivor).differences(run_plain(MLP, steps=STEPS)) == []
    later = new_session(MLP)
    with open_lms(later, BUDGET, spill_dir):
        plain_step(later, 0)
        assert len(list(spill_dir.iterdir())) == 1, "its own"
    assert list(spill_dir.iterdir()) == []


def test_whoever_cleans_up_leaves_the_living_alone(spill_dir: Path) -> None:
    """One process trains, a second is killed, a third starts meanwhile, cleans up, and is killed, too."""
    first = Victim(in_backward, 4, spill_dir)
    survivor = new_session(MLP)
    with open_lms(survivor, BUDGET, spill_dir) as lms:
        for number in range(STEPS):
            if number == 2:
                first.ready()
                first.killed()
                assert owners(spill_dir) == {os.getpid(), first.pid}
            if number == 4:
                second = Victim(in_the_optimizer, 4, spill_dir)
                second.ready()
                assert owners(spill_dir) == {os.getpid(), second.pid}, "what the first left is gone"
                second.killed()
            plain_step(survivor, number)
        assert lms.stats()["bytes_out_per_step"] > 0
        assert owners(spill_dir) == {os.getpid(), second.pid}
    assert outcome(survivor).differences(run_plain(MLP, steps=STEPS)) == []
    with SpillFile(spill_dir, None):
        assert owners(spill_dir) == {os.getpid()}
    assert list(spill_dir.iterdir()) == []


def owners(spill_dir: Path) -> set[int]:
    """The processes whose directories are there."""
    return {int(path.name.split("-")[1]) for path in spill_dir.iterdir()}


class Victim:
    """A process that trains until it is in ``phase`` of ``step``, says so, and is killed there."""

    def __init__(self, phase: Callable[[Session, Die], None], step: int, spill_dir: Path) -> None:
        self._hears, says = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            signal.alarm(WAIT_S)
            try:
                train_until(phase, step, spill_dir, says)
            finally:
                os._exit(1)
        os.close(says)

    @property
    def pid(self) -> int:
        return self._process

    def ready(self) -> None:
        with os.fdopen(self._hears, "rb") as pipe:
            assert pipe.read(1) == b"!"

    def killed(self) -> None:
        os.kill(self._process, signal.SIGKILL)
        _, status = os.waitpid(self._process, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def train_until(phase: Callable[[Session, Die], None], step: int, spill_dir: Path, says: int) -> None:
    def die() -> None:
        os.write(says, b"!")
        while True:
            signal.pause()

    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir):
        for number in range(step):
            plain_step(session, number)
        phase(session, die)
        plain_step(session, step)
