"""Small networks, one of each kind that trains differently, with a batch for every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Residual(nn.Module):
    """Two convolutions with BatchNorm and in-place ReLU, and the way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, channels: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.blocks = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class UNet3d(nn.Module):
    """One level down and up again, with a skip that waits from the one to the other."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.enter = self._block(1, width)
        self.down = self._block(width, 2 * width)
        self.widen = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.up = self._block(2 * width, width)
        self.head = nn.Conv3d(width, 3, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, padding=1),
            nn.InstanceNorm3d(outputs, affine=True),
            nn.ReLU(inplace=True),
            nn.Conv3d(outputs, outputs, 3, padding=1),
            nn.LeakyReLU(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        low = self.down(F.max_pool3d(skip, 2))
        return self.head(self.up(torch.cat([self.widen(low), skip], 1))).flatten(2).mean(2)


class Transformer(nn.Module):
    """Embedding, causal attention, GELU and dropout; the embedding is also the head's weight."""

    def __init__(self, width: int = 32, layers: int = 2, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.position = nn.Parameter(0.1 * torch.randn(64, width))
        self.layers = nn.ModuleList(TransformerLayer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).mean(1)


class TransformerLayer(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(
            self.out(attended.transpose(1, 2).reshape(batch, length, width)), 0.1, self.training
        )
        return x + self.mlp(self.norm2(x))


class Recurrent(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(torch.tanh(out).mean(1))


class Perceptron(nn.Module):
    def __init__(self, width: int = 24, layers: int = 10) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Linear(16, width)]
        for _ in range(layers):
            stages += [nn.Sigmoid(), nn.Dropout(0.2), nn.Linear(width, width)]
        self.layers = nn.Sequential(*stages, nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@dataclass(frozen=True)
class Network:
    """A model, how its optimizer is made, and what it learns from."""

    name: str
    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    make_inputs: Callable[[torch.Generator, int], Tensor]
    batch_size: int
    classes: int = 10

    def batch(self, step: int, batch_size: int | None = None) -> Batch:
        """The batch of one step: always the same for the same step, on the default device."""
        generator = torch.Generator().manual_seed(100 + step)
        size, device = batch_size or self.batch_size, torch.get_default_device()
        with torch.device("cpu"):
            inputs = self.make_inputs(generator, size)
            target = torch.randint(0, self.classes, (size,), generator=generator)
        return inputs.to(device), target.to(device)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _images(generator: torch.Generator, size: int) -> Tensor:
    return torch.randn(size, 3, 16, 16, generator=generator)


def _volumes(generator: torch.Generator, size: int) -> Tensor:
    return torch.randn(size, 1, 8, 8, 8, generator=generator)


def _tokens(generator: torch.Generator, size: int) -> Tensor:
    return torch.randint(0, 50, (size, 16), generator=generator)


def _sequences(generator: torch.Generator, size: int) -> Tensor:
    return torch.randn(size, 20, 8, generator=generator)


def _rows(generator: torch.Generator, size: int) -> Tensor:
    return torch.randn(size, 16, generator=generator)


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet", ResNet, _sgd, _images, 16),
        Network("unet3d", UNet3d, _adam, _volumes, 8, classes=3),
        Network("transformer", Transformer, _adam, _tokens, 16, classes=50),
        Network("lstm", Recurrent, _sgd, _sequences, 32),
        Network("mlp", Perceptron, _adam, _rows, 512),
    )
}
