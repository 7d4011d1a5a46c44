"""Loops by what is done to their values: views, writes in place, random numbers, functions, checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sessions import Session
from small_networks import NETWORKS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.matrix.row import Row
from tests.matrix.stack import WIDTH, stack, stack_of


def slices(x: Tensor) -> Tensor:
    left, right = x[:, ::2], x[:, 1::2]
    return torch.cat([left * right.sigmoid(), left.exp()[:, 1:] * right[:, :-1].tanh(), x[:, :1]], 1)


def transposes(x: Tensor) -> Tensor:
    wide = x.t().sigmoid()
    return (wide * x.view(-1, 4, 8).permute(1, 2, 0).tanh().reshape(WIDTH, -1)).t() + x.mT.exp().T


def chunks(x: Tensor) -> Tensor:
    one, two, three, four = x.tanh().chunk(4, 1)
    five, six = (x * x).split([8, 24], 1)
    return torch.cat([one * two.exp(), three * four, five.sin(), six[:, :8].cos() * one], 1)


def expanded(x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True).expand_as(x)
    return torch.sigmoid(x * mean) + x[:1].expand(len(x), -1).exp() * x


def strided(x: Tensor) -> Tensor:
    y = x.tanh()
    windows = y.as_strided((len(y) - 1, 2 * WIDTH), (WIDTH, 1)).exp()
    pairs = F.pad(y, (0, 1)).unfold(1, 2, 1).exp().sum(2)
    return torch.cat([windows[:, :WIDTH] * windows[:, WIDTH:], y[:1]]) * pairs.sigmoid()


def products(x: Tensor) -> Tensor:
    return (x.sigmoid() + 0.5).view(-1, 8, 4).prod(2).repeat(1, 4).exp() * x.tanh()


def in_place(x: Tensor) -> Tensor:
    x = F.leaky_relu(x, 0.2, inplace=True)
    x = (x * 2).sigmoid_()
    y = F.dropout(x * 0.5, 0.1, inplace=True)
    y[:, :4].mul_(0.3)
    y[:, 4:8] = x[:, :4].tanh()
    return y.add_(x).tanh_()


def written_through_data(x: Tensor) -> Tensor:
    """exp has saved its result; autograd does not see that it is written, and computes with what is there."""
    y = x.tanh().exp()
    y.data.clamp_(max=1.5)
    y.data[:, 0] = 1
    return y * x


def dropouts(x: Tensor) -> Tensor:
    x = F.alpha_dropout(F.dropout(x, 0.2), 0.1, training=True)
    image = F.dropout2d(x.view(-1, 8, 2, 2), 0.2)
    return F.feature_alpha_dropout(image, 0.1, training=True).reshape(len(x), -1) * torch.bernoulli(
        x.sigmoid()
    )


def rrelu(x: Tensor) -> Tensor:
    """The noise is packed before it is written."""
    return F.rrelu(F.rrelu(x, training=True) * 1.5, training=True)


def sampled(x: Tensor) -> Tensor:
    """Noise in the middle of the network, and softmax over it."""
    return x + torch.randn_like(x) * x.sigmoid() + F.gumbel_softmax(x, hard=True) * torch.rand(len(x), 1)


class Saved(torch.autograd.Function):
    """Saves an input, an output, something of its own, and something that is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        inner = x.sin()
        y = inner * factor
        ctx.save_for_backward(x, y, inner, None)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, y, inner, _ = ctx.saved_tensors
        return gradient * (x.cos() * ctx.factor + 0.1 * y * inner), None


class Kept(torch.autograd.Function):
    """Keeps tensors on its context, where no hook sees them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x, ctx.y = x.detach(), x.detach().tanh()
        return ctx.y * 1  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * (1 - ctx.y.square()) + 0 * ctx.x


class Dirty(torch.autograd.Function):
    """Writes its input and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.exp_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0]


def saving_function(x: Tensor) -> Tensor:
    return Saved.apply(Saved.apply(x, 2.0).sigmoid(), 0.5)  # type: ignore[no-any-return]


def keeping_function(x: Tensor) -> Tensor:
    return Kept.apply(x).exp()  # type: ignore[no-any-return]


def writing_function(x: Tensor) -> Tensor:
    return Dirty.apply(x * 0.5).sin()  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    """Layers with dropout that are run again in backward, by torch itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, torch.tanh(x), use_reentrant=self.reentrant).exp().sigmoid()  # type: ignore[no-any-return]


def checkpointed(session: Session, step: int) -> None:
    """Every block of a convolutional network under a checkpoint."""
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    h = session.model.stem(inputs)  # type: ignore[operator]
    for block in session.model.blocks:  # type: ignore[union-attr]
        h = checkpoint(block, h, use_reentrant=False)
    loss = F.cross_entropy(session.model.head(h.mean((2, 3))), target)  # type: ignore[operator]
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def on_cpu(x: Tensor) -> Tensor:
    """What is saved under hooks of the user's own is theirs."""
    x = x.sigmoid().exp()
    with torch.autograd.graph.save_on_cpu():
        return x.tanh().sin()


OTHER_FORMULA = "torch has another formula for the gradient of `prod` then"

ROWS = [
    Row("slices", "every second column, shifted columns", network=stack_of(slices)),
    Row("transposes", "`t`, `permute`, `mT`, `reshape`", network=stack_of(transposes)),
    Row("chunk and split", "parts of one tensor saved by several ops", network=stack_of(chunks)),
    Row("expand", "tensors larger than their storage", network=stack_of(expanded)),
    Row("as_strided", "windows that overlap, `unfold`", network=stack_of(strided)),
    Row("products", "`prod`", network=stack_of(products), any_mode=OTHER_FORMULA),
    Row("in-place activations", "`inplace=True`, `sigmoid_`, writes to slices", network=stack_of(in_place)),
    Row(
        ".data writes in forward",
        "an activation changed behind autograd's back",
        network=stack_of(written_through_data),
    ),
    Row("dropout everywhere", "alpha, feature and plain dropout, `bernoulli`", network=stack_of(dropouts)),
    Row("rrelu", "in training, with its noise saved", network=stack_of(rrelu)),
    Row("noise", "`randn_like`, `rand`, `gumbel_softmax`", network=stack_of(sampled)),
    Row(
        "custom Function",
        "with `save_for_backward` of inputs, outputs and others",
        network=stack_of(saving_function),
    ),
    Row(
        "custom Function, tensors on ctx",
        "what is not saved by `save_for_backward` stays",
        network=stack_of(keeping_function),
        share=0.85,
    ),
    Row("custom Function, in place", "with `mark_dirty`", network=stack_of(writing_function)),
    Row("checkpoint", "non-reentrant, around every block", checkpointed, NETWORKS["resnet"], 0.8),
    Row(
        "checkpoint and dropout",
        "non-reentrant, with random ops inside",
        network=stack("checkpoint", partial(Checkpointed, False)),
    ),
    Row(
        "reentrant checkpoint",
        "backward within backward",
        network=stack("reentrant", partial(Checkpointed, True)),
    ),
    Row(
        "saved-tensor hooks",
        "`save_on_cpu` around a part; what it saves is left alone",
        network=stack_of(on_cpu),
    ),
]
