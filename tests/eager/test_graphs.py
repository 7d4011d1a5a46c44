"""Graphs that live longer, die earlier, or go backward otherwise than the plan has it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eviction import SIDE, evict, leaves, open_wide
from sessions import (
    SMALL,
    Outcome,
    Session,
    assert_same_bits,
    bits,
    ledger_of,
    moved_bytes,
    new_session,
    open_lms,
    outcome,
    plain_peak,
    plain_step,
    run_lms,
    run_plain,
)
from small_networks import NETWORKS
from torch import Tensor, nn

import torchlms
from tests.matrix.programs import ADVERSARIES, adversaries

MLP = NETWORKS["mlp"]
BUDGET = 1_000_000  # of the 1.7 MB that the perceptron's plain step needs


def loss_of(session: Session, step: int) -> Tensor:
    inputs, target = session.network.batch(step)
    return F.cross_entropy(session.model(inputs), target)


def test_a_graph_that_outlives_lms(spill_dir: Path) -> None:
    """What is away comes home at the end, more than the budget if need be, and no peak is noted for it."""
    plain = new_session(MLP)
    loss_of(plain, 0).backward()
    session = new_session(MLP)
    with open_lms(session, 500_000, spill_dir) as lms:
        loss = loss_of(session, 0)
        assert moved_bytes(lms) > 500_000
    assert lms.stats()["peak_device_bytes"] <= 500_000
    assert list(spill_dir.iterdir()) == []
    loss.backward()
    assert outcome(session).gradients == outcome(plain).gradients


def test_a_graph_kept_over_several_steps(spill_dir: Path) -> None:
    def loop(session: Session, step: int) -> None:
        kept: list[Tensor] = session.model.__dict__.setdefault("kept", [])
        plain_step(session, step)
        inputs, _ = session.network.batch(step)
        kept.append(session.model(inputs[: 16 * (step + 1)]).square().mean())
        if step % 3 == 2:  # the weights of the others have moved on since
            kept[-1].backward()
            session.note(kept[-1])
            kept.clear()

    assert_same_bits(MLP, loop, spill_dir, share=0.7)


def test_an_older_graph_used_while_a_new_step_is_recorded(spill_dir: Path) -> None:
    """Two routines: when the second is recorded, values on the tape of the first still come and go."""
    torch.manual_seed(0)
    big = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(32, 32), nn.Sigmoid())])
    small = nn.Linear(16, 16)
    both = nn.ModuleList([big, small])
    state = {name: value.clone() for name, value in both.state_dict().items()}

    def train(between: Callable[[], object]) -> list[str]:
        both.load_state_dict(state)
        both.zero_grad()
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            older = big(torch.randn(64, 32, generator=generator)).sum()
            between()
            torch.sigmoid(small(torch.randn(64, 16, generator=generator))).sum().backward()
            newer = torch.sigmoid(small(torch.randn(33, 16, generator=generator))).sum()
            between()
            older.backward()
            newer.backward()
        return [bits(parameter.grad) for parameter in both.parameters() if parameter.grad is not None]

    plain = train(lambda: None)
    for pressed in (False, True):
        both.zero_grad()
        with torchlms.LMS(both, budget="1MiB", disk_dir=spill_dir, rules=SMALL) as lms:
            assert train((lambda: evict(lms)) if pressed else (lambda: None)) == plain
            assert (moved_bytes(lms) > 0) is pressed


def forgotten_no_grad(session: Session, step: int) -> None:
    """Graphs that are made, looked at and dropped, some of them much later."""
    kept: list[Tensor] = session.model.__dict__.setdefault("kept", [])
    if step % 2:
        session.note(loss_of(session, 100 + step))
    kept.append(session.model(session.network.batch(step, 8)[0]))
    plain_step(session, step)


def test_graphs_that_never_go_backward(spill_dir: Path) -> None:
    rules = {"move_ops": ("*",), "min_bytes": 0}
    assert_same_bits(MLP, forgotten_no_grad, spill_dir, share=1.2, rules=rules)


def test_graphs_that_never_go_backward_under_pressure(spill_dir: Path) -> None:
    assert_same_bits(MLP, forgotten_no_grad, spill_dir, share=0.7)


def test_nothing_is_kept_alive(spill_dir: Path) -> None:
    """A dropped graph is gone at once, with its memory and its place on disk, also in a recorded step."""
    with open_lms(new_session(MLP), BUDGET, spill_dir, rules=SMALL) as lms:
        x, w = leaves()
        y = torch.tanh(x @ w).exp()
        loss = y.sum()
        saved = [weakref.ref(slot) for slot in lms._engine.living()]  # type: ignore[union-attr]
        before = ledger_of(lms).live_bytes
        assert saved
        assert evict(lms) > 0
        assert lms._engine.store.spill.in_use_bytes > 0  # type: ignore[union-attr]
        del y, loss
        assert [slot for slot in saved if slot() is not None] == []
        assert lms._engine.store.spill.in_use_bytes == 0  # type: ignore[union-attr]
        assert ledger_of(lms).live_bytes < before - 2 * 4 * SIDE * SIDE
    engine = weakref.ref(lms._engine)
    del lms
    gc.collect()
    assert engine() is None


def test_only_a_part_goes_backward(spill_dir: Path) -> None:
    """Gradients of some inputs only, and the rest of the graph dropped or used later."""

    def parts(between: Callable[[], object]) -> list[str]:
        x, w = leaves()
        h = (x @ w).tanh()
        first, second = (h @ w).exp(), (h * w).sin()
        del h
        found = [*torch.autograd.grad(first.sum(), w, retain_graph=True)]
        between()
        found += torch.autograd.grad(second.sum(), (x, w), retain_graph=True)
        between()
        found += torch.autograd.grad((first * second).sum(), x)
        return [bits(item) for item in found]

    away: list[int] = []
    plain = parts(lambda: None)
    with open_wide(spill_dir) as lms:
        assert parts(lambda: away.append(evict(lms))) == plain
    assert min(away) > 0


def test_backward_in_another_order_than_recorded(spill_dir: Path) -> None:
    def loop(session: Session, step: int) -> None:
        inputs, target = session.network.batch(step)
        session.optimizer.zero_grad()
        halves = [
            F.cross_entropy(session.model(part), aim)
            for part, aim in zip(inputs.chunk(2), target.chunk(2), strict=True)
        ]
        for loss in halves if step % 3 else reversed(halves):
            loss.backward()
            session.note(loss)
        session.optimizer.step()

    assert_same_bits(MLP, loop, spill_dir, share=0.7)


def test_other_branches_than_recorded(spill_dir: Path) -> None:
    """Layers that are left out in some steps, as stochastic depth does."""

    def loop(session: Session, step: int) -> None:
        inputs, target = session.network.batch(step)
        session.optimizer.zero_grad()
        layers = session.model.layers
        assert isinstance(layers, nn.Sequential)
        h = layers[:4](inputs)
        for index in range(4, 31, 3):
            if (index * 7 + step * 5) % 4:
                h = layers[index : index + 3](h)
        loss = F.cross_entropy(layers[31](h), target)
        loss.backward()
        session.optimizer.step()
        session.note(loss)

    watched = assert_same_bits(MLP, loop, spill_dir, share=0.7, steps=12)
    assert watched.stats["strayed"] > 0


def test_another_thread_is_left_alone(spill_dir: Path) -> None:
    plain = run_plain(MLP)
    found: list[Outcome] = []
    # The default generator is everybody's, so a network without dropout.
    quiet = NETWORKS["resnet"]
    alone = run_plain(quiet)

    def train_alone() -> None:
        session = new_session(quiet)
        for step in range(6):
            plain_step(session, step)
        found.append(outcome(session))

    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir) as lms:
        for step in range(6):
            plain_step(session, step)
            if step == 2:
                state, steps, live = torch.get_rng_state(), lms.stats()["steps"], ledger_of(lms).live_bytes
                worker = threading.Thread(target=train_alone)
                worker.start()
                worker.join()
                torch.set_rng_state(state)
                assert lms.stats()["steps"] == steps
                assert ledger_of(lms).live_bytes == live
    assert outcome(session).differences(plain) == []
    assert found[0].parameters == alone.parameters


def test_backward_in_another_thread(spill_dir: Path) -> None:
    """The graph is this thread's, the backward pass that of another; what was away comes back there."""
    plain = new_session(MLP)
    loss_of(plain, 0).backward()
    session = new_session(MLP)
    with open_lms(session, 500_000, spill_dir):
        loss = loss_of(session, 0)
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    assert outcome(session).gradients == outcome(plain).gradients


@pytest.mark.parametrize("budget_bytes", [500_000, 600_000, 800_000])
def test_generator_and_discriminator(budget_bytes: int, spill_dir: Path) -> None:
    watched = run_lms(ADVERSARIES, budget_bytes, spill_dir, adversaries)
    assert watched.outcome.differences(run_plain(ADVERSARIES, adversaries)) == []
    assert watched.peak_bytes <= budget_bytes


def test_the_budget_here_is_a_real_one() -> None:
    assert plain_peak(MLP) > 1.5 * BUDGET
