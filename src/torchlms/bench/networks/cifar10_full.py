"""cifar10_full: Caffe's example network, the one on which IBM measured Large Model Support."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class WithinChannelNorm(nn.Module):
    """Caffe's LRN with ``norm_region: WITHIN_CHANNEL``: divide by the energy of a 3x3 neighbourhood."""

    def __init__(self, *, size: int = 3, alpha: float = 5e-5, beta: float = 0.75) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        energy = F.avg_pool2d(x * x, self.size, stride=1, padding=self.size // 2)
        return x * (1.0 + self.alpha * energy).pow(-self.beta)


class Cifar10Full(nn.Module):
    """Three 5x5 convolutions and one linear layer; 89,578 weights at 32x32."""

    def __init__(self, *, image_size: int = 32, classes: int = 10) -> None:
        super().__init__()
        # Caffe rounds pooled sizes up and writes its ReLU in place.
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.ReLU(inplace=True),
            WithinChannelNorm(),
            nn.Conv2d(32, 32, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(3, stride=2, ceil_mode=True),
            WithinChannelNorm(),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(3, stride=2, ceil_mode=True),
        )
        edge = image_size
        for _ in range(3):
            edge = _pooled(edge)
        self.classifier = nn.Linear(64 * edge * edge, classes)
        for module, std in zip(self._weighted(), (1e-4, 0.01, 0.01, 0.01), strict=True):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _weighted(self) -> list[nn.Conv2d | nn.Linear]:
        return [module for module in self.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def _pooled(edge: int) -> int:
    """Edge after a 3x3 pool of stride 2 with the size rounded up."""
    return math.ceil((edge - 3) / 2) + 1
