"""llama: a decoder of Llama's shape: RMSNorm, rotary positions, grouped queries, SwiGLU, causal SDPA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlms.errors import BadOption

if TYPE_CHECKING:
    from torchlms.bench.networks.network import Batch, NetworkOptions

_HEAD_WIDTH = 128
_ROTARY_BASE = 10000.0


class Attention(nn.Module):
    """Causal self-attention; ``kv_heads`` below ``heads`` shares keys and values among queries."""

    def __init__(self, hidden: int, *, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_width = hidden // heads
        self.grouped = kv_heads != heads
        self.query = nn.Linear(hidden, heads * self.head_width, bias=False)
        self.key = nn.Linear(hidden, kv_heads * self.head_width, bias=False)
        self.value = nn.Linear(hidden, kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(heads * self.head_width, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            _rotate(query, cos, sin), _rotate(key, cos, sin), value, is_causal=True, enable_gqa=self.grouped
        )
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class SwiGLU(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, hidden: int, inner: int, *, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.attention = Attention(hidden, heads=heads, kv_heads=kv_heads)
        self.feed_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.feed = SwiGLU(hidden, inner)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        result: Tensor = x + self.feed(self.feed_norm(x))
        return result


class Llama(nn.Module):
    """hidden 2048, 24 layers, vocabulary 32000: 1.36 billion weights. The head is not tied."""

    def __init__(
        self, *, hidden: int, layers: int, heads: int, kv_heads: int, sequence: int, vocab: int
    ) -> None:
        super().__init__()
        inner = -(-hidden * 8 // 3 // 256) * 256  # 8/3 of hidden, up to a multiple of 256
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(
            Block(hidden, inner, heads=heads, kv_heads=kv_heads) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, vocab, bias=False)
        cos, sin = _rotary_table(hidden // heads, sequence)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]  # type: ignore[index]
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def make_llama(options: NetworkOptions) -> nn.Module:
    heads = options.heads or max(1, options.hidden // _HEAD_WIDTH)
    kv_heads = options.kv_heads or heads
    if options.hidden % heads or (options.hidden // heads) % 2:
        raise BadOption(f"--hidden {options.hidden} --heads {heads}: each head needs an even, whole width")
    if heads % kv_heads:
        raise BadOption(f"--heads {heads} --kv-heads {kv_heads}: heads must be a multiple of kv-heads")
    return Llama(
        hidden=options.hidden,
        layers=options.layers,
        heads=heads,
        kv_heads=kv_heads,
        sequence=options.sequence,
        vocab=options.vocab,
    )


def token_batch(options: NetworkOptions, device: torch.device, generator: torch.Generator) -> Batch:
    """Random tokens; the target is the next one."""
    size = (options.batch_size, options.sequence + 1)
    tokens = torch.randint(0, options.vocab, size, device=device, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy per token, in float32."""
    return F.cross_entropy(output.flatten(0, 1).float(), target.flatten())


def _rotary_table(width: int, sequence: int) -> tuple[Tensor, Tensor]:
    frequency = _ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(sequence, dtype=torch.float32), frequency)
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([angle.sin(), angle.sin()], -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + width/2) by its position's angle."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
