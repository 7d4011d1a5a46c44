"""Large: networks of transformers at their published sizes, made from their configurations, without weights.

``--model large:vit_large`` in ``torchlms bench`` and in rows.py. They compute under bfloat16 autocast with
float32 parameters, as most people train them, with dropout where the configuration has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchlms.bench.networks.network import Batch, MakeBatch, NetworkOptions


class Mixed(nn.Module):
    """``inner`` under autocast; its scores come out as float32."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Any) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = self.inner(**inputs) if isinstance(inputs, dict) else self.inner(inputs)
        scores: Tensor = out.logits
        return scores.float()


def vit_large() -> nn.Module:
    """ViT-L/16: 304 million parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        num_labels=1000,
    )
    return Mixed(ViTForImageClassification(config))


def bert_large() -> tuple[nn.Module, MakeBatch]:
    """BERT-large with a head for two classes, 512 tokens: 335 million parameters, dropout 0.1."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=2
    )
    return Mixed(BertForSequenceClassification(config)), _text(config.vocab_size, 512, classes=2)


def convnext_large() -> nn.Module:
    """ConvNeXt-L: 198 million parameters, depthwise convolutions, layer norms and layer scale."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536], num_labels=1000)
    return Mixed(ConvNextForImageClassification(config))


def t5_large() -> tuple[nn.Module, MakeBatch]:
    """T5-large, encoder and decoder, 512 tokens each: 738 million parameters, dropout 0.1."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=1024, d_ff=4096, num_layers=24, num_decoder_layers=24, num_heads=16, decoder_start_token_id=0,
        use_cache=False,  # which checkpoint could not run again
    )  # fmt: skip

    def make_batch(options: NetworkOptions, device: torch.device, generator: torch.Generator) -> Batch:
        shape = (options.batch_size, 512)
        source, target = (
            torch.randint(2, config.vocab_size, shape, device=device, generator=generator) for _ in range(2)
        )
        return {"input_ids": source, "decoder_input_ids": target.roll(1, 1)}, target

    return Mixed(T5ForConditionalGeneration(config)), make_batch


def gpt2_medium() -> tuple[nn.Module, MakeBatch]:
    """GPT-2 medium, 1024 tokens, each to be foretold from those before: 355 million parameters, dropout 0.1.

    Without the cache of keys and values, which training has no use for and ``checkpoint`` would fill twice.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16, use_cache=False)

    def make_batch(options: NetworkOptions, device: torch.device, generator: torch.Generator) -> Batch:
        shape = (options.batch_size, config.n_positions + 1)
        ids = torch.randint(0, config.vocab_size, shape, device=device, generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return Mixed(GPT2LMHeadModel(config)), make_batch


def swin_base() -> nn.Module:
    """Swin-B, 224x224: 88 million parameters, attention in windows, stochastic depth 0.1."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], num_labels=1000)
    return Mixed(SwinForImageClassification(config))


def _text(vocabulary: int, tokens: int, *, classes: int) -> MakeBatch:
    def make_batch(options: NetworkOptions, device: torch.device, generator: torch.Generator) -> Batch:
        ids = torch.randint(0, vocabulary, (options.batch_size, tokens), device=device, generator=generator)
        labels = torch.randint(0, classes, (options.batch_size,), device=device, generator=generator)
        return ids, labels

    return make_batch
