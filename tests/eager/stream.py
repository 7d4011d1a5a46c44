"""A residual stream in bfloat16, as language models have it: norms and gates that save a lot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """Root mean square, in float32. Autograd saves the wide copy, not what it was made from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(torch.bfloat16)


class Gated(nn.Module):
    """One block: norm, gate, and back onto the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.gate = nn.Linear(width, 2 * width, bias=False, dtype=torch.bfloat16)
        self.up = nn.Linear(width, 2 * width, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(2 * width, width, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Stream(nn.Module):
    """Token ids to scores."""

    def __init__(self, blocks: int = 6, width: int = 64, words: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, dtype=torch.bfloat16)
        self.blocks = nn.Sequential(*(Gated(width) for _ in range(blocks)))
        self.norm = Norm(width)
        self.head = nn.Linear(width, words, bias=False, dtype=torch.bfloat16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids))))
