"""Loops of the matrix on networks that it does not train them on; they leave plain's bits there, too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.nn.functional as F
from sessions import (
    DROPPING,
    Loop,
    Session,
    assert_same_bits,
    more,
    new_session,
    open_lms,
    plain_peak,
    plain_step,
    slow_disk,
)
from small_networks import NETWORKS

import torchlms
from tests.matrix.numbers import autocast
from tests.matrix.optimizers import clipped, closure, half_frozen
from tests.matrix.passes import (
    accumulate,
    forwards_first,
    only_grad,
    penalty,
    same_graph_twice,
    two_forwards,
    two_losses,
)
from tests.matrix.programs import changing_sizes, evaluate_between

ANYWHERE = [accumulate, two_forwards, changing_sizes, evaluate_between, clipped, half_frozen]
CASES = [
    *(("resnet", loop) for loop in ANYWHERE),
    *(("transformer", loop) for loop in ANYWHERE[:3]),
    *(more("transformer", loop) for loop in ANYWHERE[3:]),
    *(more("lstm", loop) for loop in ANYWHERE),
    *(("unet3d", loop) for loop in (autocast, closure, forwards_first)),
    *((name, loop) for name in ("resnet", "transformer") for loop in (autocast, only_grad)),
]
# Parts of the graph go through backward more than once, so values are used in more than one stretch.
MORE_THAN_ONCE = [
    *((name, loop) for name in ("resnet", "transformer") for loop in (two_losses, same_graph_twice)),
    *(more("lstm", loop) for loop in (two_losses, same_graph_twice)),
    ("mlp", penalty),
    more("unet3d", penalty),
    ("resnet", penalty),
]
# An LSTM waits in few large values, and less of its plain peak can be spared.
SHARES = {"lstm": 0.85}


def _named(item: object) -> str:
    return str(getattr(item, "__name__", item))


@pytest.mark.parametrize(("name", "loop"), CASES, ids=_named)
def test_same_bits(name: str, loop: Loop, spill_dir: Path) -> None:
    assert_same_bits(NETWORKS[name], loop, spill_dir, share=SHARES.get(name, 0.7))


@pytest.mark.parametrize(("name", "loop"), MORE_THAN_ONCE, ids=_named)
def test_same_bits_when_a_graph_is_used_again(name: str, loop: Loop, spill_dir: Path) -> None:
    """Everything that can leave does, so what is used again has been away before its first use."""
    rules = {"move_ops": ("*",), "min_bytes": 0}
    assert_same_bits(NETWORKS[name], loop, spill_dir, share=1.2, rules=rules)


@pytest.mark.parametrize(("name", "loop"), MORE_THAN_ONCE[:-1], ids=_named)
def test_a_budget_that_the_recorded_step_kept(name: str, loop: Loop, spill_dir: Path) -> None:
    assert_same_bits(NETWORKS[name], loop, spill_dir, share=SHARES.get(name, 0.7))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loop"), CASES, ids=_named)
def test_same_bits_when_values_are_made_again(
    name: str, loop: Loop, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_disk(monkeypatch)
    share = SHARES.get(name, 0.7)
    watched = assert_same_bits(NETWORKS[name], loop, spill_dir, share=share, steps=8, rules=DROPPING)
    assert any(value.recipe for value in watched.tape.values)


def small_step(session: Session) -> None:
    inputs, target = session.network.batch(9)
    F.cross_entropy(session.model(inputs[:40]), target[:40]).backward()
    session.optimizer.zero_grad()


@contextlib.contextmanager
def after_nine_steps(spill_dir: Path) -> Iterator[tuple[Session, torchlms.LMS]]:
    """A session under LMS that has followed its plan for a while."""
    network = NETWORKS["mlp"]
    session = new_session(network)
    with open_lms(session, int(0.7 * plain_peak(network)), spill_dir) as lms:
        for step in range(9):
            plain_step(session, step)
        yield session, lms


def test_a_smaller_last_batch_is_not_what_is_reported(spill_dir: Path) -> None:
    """Plan, tape and figures are those of the steps that there are most of."""
    with after_nine_steps(spill_dir) as (session, lms):
        usual, tape, stats = lms.plan, lms.tape, lms.stats()
        assert usual is not None
        assert tape is not None
        for epoch in range(3):
            if epoch:
                plain_step(session, 9)
            small_step(session)
        assert lms.tape.fingerprint == tape.fingerprint == usual.fingerprint == lms.plan.fingerprint
        assert lms.stats()["bytes_out"] > 0
        assert lms.stats()["peak_device_bytes"] >= stats["peak_device_bytes"]
        assert lms.stats()["plan"].keys() == stats["plan"].keys()


def test_a_change_for_good_is(spill_dir: Path) -> None:
    """Such as when layers are unfrozen: the new kind of step is what is reported once it is followed."""
    with after_nine_steps(spill_dir) as (session, lms):
        before = lms.tape
        for _ in range(3):
            small_step(session)
        assert before is not None
        assert lms.tape is not None
        assert lms.tape.fingerprint != before.fingerprint


def test_gradients_and_states_that_came_after_the_recording_are_planned_for(
    spill_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With accumulation the first micro-step has neither; without another plan each later one would evict."""
    caplog.set_level("INFO", "torchlms")
    network = NETWORKS["transformer"]
    session = new_session(network)

    def micro_step(step: int) -> None:
        inputs, target = network.batch(step)
        F.cross_entropy(session.model(inputs), target).backward()
        if step % 4 == 3:
            session.optimizer.step()
            session.optimizer.zero_grad(set_to_none=False)

    with open_lms(session, int(0.8 * plain_peak(network)), spill_dir) as lms:
        for step in range(12):
            micro_step(step)
        reclaims = lms.stats()["reclaims"]
        for step in range(12, 20):
            micro_step(step)
        stats = lms.stats()
    assert any("than when it was recorded" in record.getMessage() for record in caplog.records)
    assert stats["reclaims"] == reclaims, "planned steps evict"
    assert stats["state"] == "guard"
