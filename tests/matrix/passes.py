"""Loops by how they go forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sessions import Session
from small_networks import NETWORKS
from torch import Tensor

from tests.matrix.row import Row


def loss_of(session: Session, step: int) -> Tensor:
    inputs, target = session.network.batch(step)
    return F.cross_entropy(session.model(inputs), target)


def accumulate(session: Session, step: int) -> None:
    """Gradients of three batches, then one optimizer step."""
    for part in range(3):
        loss = loss_of(session, 3 * step + part) / 3
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
    session.optimizer.zero_grad()
    loss = loss_of(session, step)
    loss.backward(retain_graph=True)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def only_grad(session: Session, step: int) -> None:
    """``torch.autograd.grad`` in place of backward."""
    loss = loss_of(session, step)
    parameters = list(session.model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    session.optimizer.step()
    session.note(loss)


def only_inputs(session: Session, step: int) -> None:
    """Backward to some of the leaves, then to the others over what was retained."""
    session.optimizer.zero_grad()
    loss = loss_of(session, step)
    parameters = list(session.model.parameters())
    loss.backward(retain_graph=True, inputs=parameters[len(parameters) // 2 :])
    loss.backward(inputs=parameters[: len(parameters) // 2])
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


def truncated(session: Session, step: int) -> None:
    """A recurrent network in pieces, its state handed on from step to step without its graph."""
    inputs, target = session.network.batch(0)
    state = session.kept.get("state")
    session.optimizer.zero_grad()
    out, state = session.model.lstm(inputs, state)  # type: ignore[operator]
    session.kept["state"] = tuple(part.detach() for part in state)
    loss = F.cross_entropy(session.model.head(torch.tanh(out).mean(1)), target)  # type: ignore[operator]
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def hooked(session: Session, step: int) -> None:
    """Activations and gradients looked at and changed by hooks."""
    seen: list[Tensor] = []

    def look(_module: object, _inputs: object, out: Tensor) -> None:
        seen.append(out)
        out.retain_grad()
        out.register_hook(lambda gradient: gradient * 1.5)

    handles = [module.register_forward_hook(look) for module in session.model.modules() if _is_linear(module)]
    session.optimizer.zero_grad()
    loss = loss_of(session, step)
    for handle in handles:
        handle.remove()
    loss.backward()
    for out in seen:
        assert out.grad is not None
        session.note(out.grad.norm())
    session.optimizer.step()


def _is_linear(module: object) -> bool:
    return isinstance(module, torch.nn.Linear)


LSTM = NETWORKS["lstm"]

ROWS = [
    Row("gradient accumulation", "three batches, then one optimizer step", accumulate),
    Row("several losses", "two losses over one graph, a backward call each, `retain_graph`", two_losses),
    Row("retain_graph", "backward twice over the same graph", same_graph_twice),
    Row("two forwards", "the model called twice, one loss over both", two_forwards),
    Row("older graph last", "two graphs, the older one goes backward last", forwards_first),
    Row("autograd.grad", "`torch.autograd.grad` in place of `backward`", only_grad),
    Row("backward(inputs=...)", "to half of the parameters, then to the others", only_inputs),
    Row("double backward", "gradient penalty with `create_graph=True`", penalty),
    Row("truncated backpropagation", "an LSTM's state handed on, detached", truncated, LSTM, 0.85),
    Row("hooks", "forward hooks, tensor hooks, `retain_grad`", hooked),
]
