"""Loops by what they do to parameters: optimizers, schedules, frozen, tied and adapted weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sessions import Session, plain_step
from small_networks import NETWORKS, Perceptron
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW

from tests.matrix.passes import loss_of
from tests.matrix.row import Row
from tests.matrix.stack import WIDTH, learning, stack


def clipped(session: Session, step: int) -> None:
    session.optimizer.zero_grad(set_to_none=False)
    loss = loss_of(session, step)
    loss.backward()
    session.note(torch.nn.utils.clip_grad_norm_(session.model.parameters(), 0.5))
    session.optimizer.step()
    session.note(loss)


def scheduled(session: Session, step: int) -> None:
    """One schedule of rate and momentum for every step, one that follows the loss."""
    schedulers = torch.optim.lr_scheduler
    cycle = session.keep("cycle", lambda: schedulers.OneCycleLR(session.optimizer, 0.1, total_steps=10))
    plateau = session.keep("plateau", lambda: schedulers.ReduceLROnPlateau(session.optimizer, patience=0))
    plain_step(session, step)
    cycle.step()
    plateau.step(float.fromhex(session.losses[-1]))


def closure(session: Session, step: int) -> None:
    """The optimizer runs forward and backward itself, as often as it likes."""

    def evaluate() -> Tensor:
        session.optimizer.zero_grad()
        loss = loss_of(session, step)
        loss.backward()
        session.note(loss)
        return loss

    session.optimizer.step(evaluate)


def half_frozen(session: Session, step: int) -> None:
    parameters = list(session.model.parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(step >= 4)  # thawed later: another graph from then on
    plain_step(session, step)


def in_backward(session: Session, step: int) -> None:
    """Parameters are updated by hooks while backward still runs."""
    if step == 0:
        for parameter in session.model.parameters():
            own = torch.optim.SGD([parameter], lr=0.01)

            def update(item: Tensor, own: torch.optim.Optimizer = own) -> None:
                own.step()
                own.zero_grad()

            parameter.register_post_accumulate_grad_hook(update)
    loss = loss_of(session, step)
    loss.backward()
    session.note(loss)


def averaged(session: Session, step: int) -> None:
    """A moving average of the weights beside them, evaluated in every step."""
    average = session.keep(
        "average",
        lambda: torch.optim.swa_utils.AveragedModel(
            session.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        ),
    )
    plain_step(session, step)
    average.update_parameters(session.model)
    with torch.no_grad():
        inputs, target = session.network.batch(step)
        session.note(F.cross_entropy(average.eval()(inputs), target))


def through_data(session: Session, step: int) -> None:
    """Weights decayed, and weights clamped, by writes that autograd does not count."""
    plain_step(session, step)
    for parameter in session.model.parameters():
        parameter.data.mul_(0.999)
        parameter.data = parameter.data.clamp(-0.5, 0.5)


class Adapted(nn.Module):
    """A frozen layer, and two thin ones beside it that learn."""

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, rank, bias=False)
        self.up = nn.Linear(rank, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.base(x) + 2 * self.up(F.dropout(self.down(x), 0.1, self.training)))


def trainable(model: nn.Module) -> torch.optim.Optimizer:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".down." in name or ".up." in name or name.startswith("leave"))
    return torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-2)


class Shared(nn.Module):
    """One block, called again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 10)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(8):
            x = x + self.block(x)
        return self.leave(x)


class Autoencoder(nn.Module):
    """The way back has the weights of the way there, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.leave = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        for layer in reversed(self.layers):
            x = torch.sigmoid(F.linear(x - layer.bias, layer.weight.t()))
        return self.leave(x)


def _perceptron(name: str, optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Any:
    return learning(
        name, partial(Perceptron, WIDTH, 6), lambda model: optimizer(model.parameters(), **options)
    )


ROWS = [
    Row(
        "SGD",
        "momentum, Nesterov, `foreach`",
        network=_perceptron("SGD", SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    ),
    Row(
        "AdamW, fused",
        "one kernel for all parameters",
        network=_perceptron("fused", AdamW, lr=1e-2, fused=True),
    ),
    Row(
        "AdamW, foreach",
        "`amsgrad`, `foreach`",
        network=_perceptron("foreach", AdamW, lr=1e-2, foreach=True, amsgrad=True),
    ),
    Row(
        "LBFGS",
        "a closure with several forwards and backwards a step",
        closure,
        _perceptron("LBFGS", LBFGS, lr=0.5, max_iter=4, history_size=3, line_search_fn="strong_wolfe"),
    ),
    Row("closure", "an ordinary optimizer that is given a closure", closure),
    Row("gradient clipping", "`clip_grad_norm_`, gradients zeroed in place", clipped),
    Row(
        "schedulers",
        "`OneCycleLR`, which also turns momentum, and `ReduceLROnPlateau`",
        scheduled,
        NETWORKS["resnet"],
    ),
    Row(
        "optimizer in backward",
        "parameters updated by hooks while backward runs",
        in_backward,
        NETWORKS["resnet"],
    ),
    Row("averaged weights", "`AveragedModel`, evaluated in every step", averaged),
    Row(".data writes", "parameters written and replaced through `.data`", through_data),
    Row("frozen parameters", "half of them, thawed in the fifth step", half_frozen),
    Row(
        "adapters",
        "LoRA: frozen layers, and thin ones beside them that learn",
        network=learning("lora", partial(stack("lora", Adapted).make_model), trainable),
    ),
    Row("tied weights", "the embedding is also the head's weight", network=NETWORKS["transformer"]),
    Row(
        "tied and transposed",
        "layers used again on the way back",
        network=learning("autoencoder", Autoencoder),
    ),
    Row("shared module", "one block called eight times", network=learning("shared", Shared)),
]
