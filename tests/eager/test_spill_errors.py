"""A disk that is full, too small or broken: one clear error, and the training state is intact."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import Session, new_session, open_lms, outcome, plain_step, run_plain
from small_networks import NETWORKS

import torchlms

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

MLP = NETWORKS["mlp"]
BUDGET = 800_000  # of 1.7 MB


class Progress:
    """How far training came, and the generator's state before the step that failed."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.finished = 0
        self.generator = torch.get_rng_state()

    def train(self, steps: int) -> None:
        while self.finished < steps:
            self.generator = torch.get_rng_state()
            plain_step(self.session, self.finished)
            self.finished += 1


def assert_training_can_go_on(progress: Progress, spill_dir: Path) -> None:
    """From what the last finished step left, in a new LMS, to where plain training ends."""
    assert list(spill_dir.iterdir()) == []
    expected = run_plain(MLP)
    torch.set_rng_state(progress.generator)
    with open_lms(progress.session, BUDGET, spill_dir):
        progress.train(6)
    assert outcome(progress.session).differences(expected) == []


@pytest.mark.parametrize("after", [3, 60])
@pytest.mark.parametrize(("call", "reason"), [("pwrite", errno.ENOSPC), ("preadv", errno.EIO)])
def test_a_disk_that_fails(
    call: str, reason: int, after: int, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(os, call), iter(range(1 << 30))

    def failing(*args: Any) -> int:
        if next(calls) >= after:
            raise OSError(reason, "on purpose")
        return int(real(*args))

    progress = Progress(new_session(MLP))
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        lms = open_lms(progress.session, BUDGET, spill_dir)
        with pytest.raises(torchlms.SpillError, match="on purpose") as raised, lms:
            progress.train(6)
    assert raised.value.errno == reason
    assert isinstance(raised.value, OSError)
    assert (progress.finished == 0) is (after == 3)
    assert progress.finished < 6
    assert_training_can_go_on(progress, spill_dir)


def test_a_disk_that_is_full_from_the_start(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filesystem says so when space is reserved: nothing was written yet."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "on purpose")

    progress = Progress(new_session(MLP))
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        lms = open_lms(progress.session, BUDGET, spill_dir)
        with pytest.raises(torchlms.HostBudgetTooSmall, match="cannot grow: on purpose") as raised, lms:
            progress.train(6)
    assert raised.value.missing_bytes > 0
    assert_training_can_go_on(progress, spill_dir)


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("rules", [{}, {"recompute": False}], ids=["", "moving alone"])
def test_once_there_is_room_again_the_same_block_goes_on(
    at: int, rules: dict[str, Any], spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that failed leaves nothing that takes memory from the next try."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "on purpose")

    progress = Progress(new_session(MLP))
    with open_lms(progress.session, BUDGET, spill_dir, rules={"min_bytes": 1024, **rules}):
        progress.train(at)
        with monkeypatch.context() as patched:
            for call in ("posix_fallocate", "pwrite"):
                patched.setattr(os, call, full)
            with pytest.raises((torchlms.HostBudgetTooSmall, torchlms.SpillError)):
                progress.train(6)
        assert progress.finished == at
        torch.set_rng_state(progress.generator)
        progress.session.optimizer.zero_grad()
        progress.train(6)
    assert outcome(progress.session).differences(run_plain(MLP)) == []


@pytest.mark.parametrize("disk_budget", [4096, "200KB"])
def test_a_disk_budget_that_is_too_small(disk_budget: int | str, spill_dir: Path) -> None:
    progress = Progress(new_session(MLP))
    lms = open_lms(progress.session, BUDGET, spill_dir, disk_budget=disk_budget)
    with pytest.raises(torchlms.HostBudgetTooSmall, match="disk_budget") as raised, lms:
        progress.train(6)
    assert progress.finished == 0
    assert 0 < raised.value.missing_bytes < 2 * BUDGET
    assert_training_can_go_on(progress, spill_dir)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    progress = Progress(new_session(MLP))
    with (
        pytest.raises(torchlms.BadOption, match="file is not a directory"),
        open_lms(progress.session, BUDGET, in_the_way / "spill"),
    ):
        raise AssertionError("said before anything ran")
    (tmp_path / "elsewhere").mkdir()
    assert_training_can_go_on(progress, tmp_path / "elsewhere")
