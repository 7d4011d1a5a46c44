"""Loops by the layers of their networks: norms, recurrent layers, attention, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from small_networks import NETWORKS, Network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.matrix.row import Row
from tests.matrix.stack import WIDTH, adamw, stack


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


HALVES = "on a device this kernel takes no float32; tests/gpu tries each in bfloat16"

ROWS = [
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
        only_cpu=HALVES,
    ),
    Row(
        "attention with a mask",
        "an additive mask, flash kernel",
        network=stack("masked", partial(Attention, SDPBackend.FLASH_ATTENTION, True), 2),
        only_cpu=HALVES,
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
