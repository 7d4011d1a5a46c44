"""Graphs that autograd goes through more than once: their values may be away before each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sessions import (
    DROPPING,
    SMALL,
    Session,
    new_session,
    open_lms,
    plain_peak,
    run_lms,
    run_plain,
    slow_disk,
)
from small_networks import NETWORKS

from tests.matrix.passes import penalty, same_graph_twice, two_losses
from torchlms.core.tape import Phase, Tape
from torchlms.core.validate import validate

NETWORK = NETWORKS["mlp"]
STEPS = 9


LOOPS: list[Callable[[Session, int], None]] = [same_graph_twice, two_losses, penalty]


def backward_passes(tape: Tape) -> int:
    """By the longest list of idle stretches."""
    return max(len(value.idle) for value in tape.values)


@pytest.mark.parametrize("rules", [SMALL, DROPPING], ids=["moved", "dropped"])
@pytest.mark.parametrize("loop", LOOPS)
def test_they_follow_a_plan(
    loop: Callable[[Session, int], None], rules: dict[str, object], spill_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if rules is DROPPING:
        slow_disk(monkeypatch)
    plain = run_plain(NETWORK, loop, STEPS)
    # With less, next to nothing of a penalty's that can be made again may leave.
    share = 0.85 if rules is DROPPING and loop is penalty else 0.7
    budget_bytes = int(share * plain_peak(NETWORK, loop))
    watched = run_lms(NETWORK, budget_bytes, spill_dir, loop, STEPS, rules=rules)
    assert watched.outcome.differences(plain) == []
    assert watched.peak_bytes <= budget_bytes
    assert watched.stats["state"] == "guard"
    assert watched.stats["strayed"] == 0
    assert watched.plan.moves
    if rules is DROPPING:
        assert watched.stats["replayed_ops"]


def test_a_value_has_a_stretch_before_each_pass(spill_dir: Path) -> None:
    budget_bytes = int(0.6 * plain_peak(NETWORK, same_graph_twice))
    watched = run_lms(NETWORK, budget_bytes, spill_dir, same_graph_twice, STEPS)
    tape = watched.tape
    assert backward_passes(tape) == 2
    for value in tape.values:
        for before, after in zip(value.idle, value.idle[1:], strict=False):
            assert before.stop < after.start
            assert tape.ops[before.stop].phase is Phase.BACKWARD
    moved_again = [move for move in watched.plan.moves if move.stretch == 1]
    assert moved_again, "under this budget something has to go between the passes, too"
    assert validate(watched.tape, watched.plan) == []


def test_one_pass_is_one_stretch(spill_dir: Path) -> None:
    """Between two uses in the same pass a value stays."""
    for name in ("resnet", "transformer"):
        network = NETWORKS[name]
        watched = run_lms(network, int(0.7 * plain_peak(network)), spill_dir, steps=4)
        assert backward_passes(watched.tape) == 1


def test_a_state_carried_from_step_to_step_does_not_make_one_long_step(spill_dir: Path) -> None:
    """Its graph is retained and grows; each optimizer's step ends a micro-step all the same."""

    def carried(session: Session, step: int) -> None:
        inputs, target = session.network.batch(step)
        state = session.keep("state", lambda: torch.randn(64, 64, requires_grad=True))
        state = session.kept["state"] = torch.sin(state * 2)
        session.optimizer.zero_grad()
        loss = F.cross_entropy(session.model(inputs), target) + state.mean()
        loss.backward(retain_graph=True)
        session.optimizer.step()

    session = new_session(NETWORK)
    with open_lms(session, "1GiB", spill_dir) as lms:
        for step in range(4):
            carried(session, step)
        assert lms.stats()["steps"] == 4
        del session.kept["state"]


def test_what_is_computed_from_a_slope_is_of_the_same_step(spill_dir: Path) -> None:
    session = new_session(NETWORK)
    with open_lms(session, "1GiB", spill_dir) as lms:
        for step in range(3):
            penalty(session, step)
        assert lms.stats()["steps"] == 3
        assert lms.stats()["record_steps"] == 1
