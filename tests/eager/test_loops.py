"""Loops as people write them: none needs a special word, and each leaves plain's bits within the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sessions import DROPPING, Loop, Session, assert_same_bits, plain_step, slow_disk
from small_networks import NETWORKS


def accumulate(session: Session, step: int) -> None:
    """Gradients of three batches, then one optimizer step."""
    for part in range(3):
        inputs, target = session.network.batch(3 * step + part)
        loss = F.cross_entropy(session.model(inputs), target) / 3
        loss.backward()
        session.note(loss)
    session.optimizer.step()
    session.optimizer.zero_grad()


def two_losses(session: Session, step: int) -> None:
    """Two losses over one graph, each with a backward pass of its own."""
    inputs, target = session.network.batch(step)
    logits = session.model(inputs)
    first, second = F.cross_entropy(logits, target), logits.square().mean()
    first.backward(retain_graph=True)
    (0.1 * second).backward()
    session.note(first)
    session.note(second)
    session.optimizer.step()
    session.optimizer.zero_grad()


def two_forwards(session: Session, step: int) -> None:
    """The model called twice, one backward pass over both graphs."""
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    there, back = session.model(inputs), session.model(inputs.flip(0))
    loss = F.cross_entropy(there, target) + F.mse_loss(there, back.flip(0))
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def forwards_first(session: Session, step: int) -> None:
    """Two graphs, and the older one goes through backward last."""
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    older = F.cross_entropy(session.model(inputs), target)
    newer = F.cross_entropy(session.model(inputs.flip(0)), target)
    older.backward()
    newer.backward()
    session.optimizer.step()
    session.note(older)
    session.note(newer)


def same_graph_twice(session: Session, step: int) -> None:
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(inputs), target)
    loss.backward(retain_graph=True)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def autocast(session: Session, step: int) -> None:
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(session.model(inputs).float(), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def changing_sizes(session: Session, step: int) -> None:
    """Another batch size almost every step, and a small last batch."""
    whole = session.network.batch_size
    size = [whole, whole // 2, whole - 3, whole, 3][step % 5]
    inputs, target = session.network.batch(step, size)
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(inputs), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def evaluate_between(session: Session, step: int) -> None:
    """Evaluation without gradients after every step, with them by mistake after every second."""
    plain_step(session, step)
    inputs, target = session.network.batch(50 + step)
    session.model.eval()
    with torch.no_grad() if step % 2 else torch.inference_mode():
        session.note(F.cross_entropy(session.model(inputs), target))
    if step % 2:
        session.note(F.cross_entropy(session.model(inputs), target))
    session.model.train()


def keep_gradients(session: Session, step: int) -> None:
    session.optimizer.zero_grad(set_to_none=False)
    inputs, target = session.network.batch(step)
    loss = F.cross_entropy(session.model(inputs), target)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(session.model.parameters(), 0.5)
    session.optimizer.step()
    session.note(loss)


def half_frozen(session: Session, step: int) -> None:
    parameters = list(session.model.parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(step >= 4)  # thawed later: another graph from then on
    plain_step(session, step)


def closure(session: Session, step: int) -> None:
    """The optimizer runs forward and backward itself."""
    inputs, target = session.network.batch(step)

    def evaluate() -> torch.Tensor:
        session.optimizer.zero_grad()
        loss = F.cross_entropy(session.model(inputs), target)
        loss.backward()
        session.note(loss)
        return loss

    session.optimizer.step(evaluate)


def only_grad(session: Session, step: int) -> None:
    """``torch.autograd.grad`` in place of backward."""
    inputs, target = session.network.batch(step)
    loss = F.cross_entropy(session.model(inputs), target)
    parameters = list(session.model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    session.optimizer.step()
    session.note(loss)


def penalty(session: Session, step: int) -> None:
    """The gradient's own norm in the loss: a backward pass that is itself differentiated."""
    inputs, target = session.network.batch(step)
    inputs.requires_grad_()
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(inputs), target)
    (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
    (loss + slope.square().sum()).backward()
    session.optimizer.step()
    session.note(loss)


ANYWHERE = [accumulate, two_forwards, changing_sizes, evaluate_between, keep_gradients, half_frozen]
CASES = [
    *((name, loop) for loop in ANYWHERE for name in ("resnet", "transformer", "lstm")),
    *(("mlp", loop) for loop in (forwards_first, closure, only_grad, accumulate, changing_sizes)),
    *(("unet3d", loop) for loop in (autocast, closure, forwards_first)),
    *((name, loop) for name in ("resnet", "transformer") for loop in (autocast, only_grad)),
]
# Parts of the graph go through backward more than once, so values are used in more than one stretch.
MORE_THAN_ONCE = [
    *((name, loop) for name in ("resnet", "transformer", "lstm") for loop in (two_losses, same_graph_twice)),
    *((name, penalty) for name in ("mlp", "unet3d", "resnet")),
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


@pytest.mark.parametrize(("name", "loop"), CASES, ids=_named)
def test_same_bits_when_values_are_made_again(
    name: str, loop: Loop, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_disk(monkeypatch)
    share = SHARES.get(name, 0.7)
    watched = assert_same_bits(NETWORKS[name], loop, spill_dir, share=share, steps=8, rules=DROPPING)
    assert any(value.recipe for value in watched.tape.values)
