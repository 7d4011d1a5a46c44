"""Loops by what their layers do with values: views, writes in place, kernels with state, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sessions import Session
from small_networks import NETWORKS, Network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.matrix.row import WAYS, Row
from tests.matrix.stack import WIDTH, adamw, stack, stack_of


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


class Normed(nn.Module):
    """Kernels that write running statistics, which their schemas do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.BatchNorm1d(WIDTH)
        self.images = nn.BatchNorm2d(8, momentum=None)
        self.instances = nn.InstanceNorm1d(8, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instances(F.silu(self.rows(x)).view(-1, 8, 4))
        return self.images(x.view(-1, 8, 2, 2)).reshape(-1, WIDTH).tanh()


class Recurring(nn.Module):
    """A recurrent layer over a sequence of four short vectors."""

    def __init__(self, make_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer = make_layer(8, 8, num_layers=2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.layer(x.view(-1, 4, 8))
        return out.reshape(-1, WIDTH).sigmoid()


class Cells(nn.Module):
    """The same by hand, a cell at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, []
        for part in x.view(-1, 4, 8).unbind(1):
            state = self.cell(part, state)
            out.append(state[0])
        return torch.cat(out, 1).sigmoid()


class Attention(nn.Module):
    def __init__(self, kernel: SDPBackend, masked: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.kernel, self.masked = kernel, masked

    def forward(self, x: Tensor) -> Tensor:
        length = len(x) // 8
        q, k, v = (part.view(8, length, 2, -1).transpose(1, 2) for part in self.project(x).chunk(3, 1))
        mask = torch.ones(length, length).tril().log() if self.masked else None
        with sdpa_kernel(self.kernel):
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not self.masked)
        return x + out.transpose(1, 2).reshape(x.shape).tanh()


class Bags(nn.Module):
    """Words looked up one by one and in bags, with gradients of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32, padding_idx=0, max_norm=2.0)
        self.pairs = nn.Embedding(50, 32, scale_grad_by_freq=True)
        self.bags = nn.EmbeddingBag(50, 32, mode="max")
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens).tanh().exp() * self.pairs(tokens.flip(1)).sigmoid().exp()
        return self.head(x.sin().sigmoid().mean(1) + self.bags(tokens))


class SparseBags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32, sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.words(tokens).tanh().exp().sin().sigmoid().mean(1) @ torch.eye(32, 50)).sigmoid()


def _words(name: str, make_model: Callable[[], nn.Module], make_optimizer: Any = adamw) -> Network:
    return Network(name, make_model, make_optimizer, NETWORKS["transformer"].make_inputs, 128, classes=50)


def sparse_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam(list(model.parameters()), lr=0.1)


OTHER_FORMULA = "torch computes the gradient of `prod` by another formula under any dispatch mode"

ROWS = [
    Row("slices", "every second column, shifted columns", network=stack_of(slices)),
    Row("transposes", "`t`, `permute`, `mT`, `reshape`", network=stack_of(transposes)),
    Row("chunk and split", "parts of one tensor saved by several ops", network=stack_of(chunks)),
    Row("expand", "tensors larger than their storage", network=stack_of(expanded)),
    Row("as_strided", "windows that overlap, `unfold`", network=stack_of(strided)),
    Row("products", "`prod`", network=stack_of(products), wrong=dict.fromkeys(WAYS, OTHER_FORMULA)),
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
    Row("convolutions", "batch normalisation, pooling, in-place ReLU", network=NETWORKS["resnet"]),
    Row("volumes", "3-d and transposed convolutions, a skip connection", network=NETWORKS["unet3d"]),
    Row(
        "batch normalisation",
        "running statistics, written where the schema does not say",
        network=stack("norms", Normed),
    ),
    Row("LSTM", "two layers with dropout", network=NETWORKS["lstm"], share=0.85),
    Row("GRU", "two layers with dropout", network=stack("gru", partial(Recurring, nn.GRU), 1)),
    Row("RNN", "two layers with dropout", network=stack("rnn", partial(Recurring, nn.RNN), 1)),
    Row("LSTM cells", "one step at a time", network=stack("cells", Cells, 1)),
    Row("attention, math kernel", "causal", network=stack("math", partial(Attention, SDPBackend.MATH), 2)),
    Row(
        "attention, flash kernel",
        "causal",
        network=stack("flash", partial(Attention, SDPBackend.FLASH_ATTENTION), 2),
    ),
    Row(
        "attention with a mask",
        "an additive mask, flash kernel",
        network=stack("masked", partial(Attention, SDPBackend.FLASH_ATTENTION, True), 2),
    ),
    Row(
        "embeddings",
        "`padding_idx`, `max_norm`, `scale_grad_by_freq`, bags",
        network=_words("bags", Bags),
        share=0.85,
    ),
    Row(
        "sparse gradients",
        "of an embedding, with `SparseAdam`",
        network=_words("sparse bags", SparseBags, sparse_adam),
        share=0.85,
    ),
]
