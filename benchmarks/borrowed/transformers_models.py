"""Transformers models: small networks of many architectures, with random weights, made from their configs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from borrowed.case import SEED, Case, Group, Subject, named_tensors, passing, seed

_VOCABULARY = 99
_BATCH = 2
_LEARNING_RATE = 0.05

Options = dict[str, Any]
Inputs = dict[str, Any]

_TEXT: Options = {
    "vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_EXPERTS = {
    **_GROUPED, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}  # fmt: skip
_DEEPSEEK = {
    **_EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 4, "mamba_expand": 2, "mamba_d_head": 16, "mamba_d_state": 8}
_BOTH_WAYS: Options = {
    "vocab_size": _VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5: Options = {
    "vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
_IMAGE: Options = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8, "num_labels": 5,
}  # fmt: skip
_SWIN = {
    "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
    "image_size": 32, "num_labels": 5,
}  # fmt: skip
_TWO_STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_labels": 5}
_FOUR_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_labels": 5}
_PYRAMID = {**_FOUR_STAGES, "num_attention_heads": [1, 1, 2, 2], "image_size": 32}
_WAVE: Options = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16, 16), "conv_stride": (4, 4, 2), "conv_kernel": (8, 4, 2),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32, "pad_token_id": 0, "mask_time_prob": 0.3, "mask_time_length": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """Architectures that are told their size in the same words, and take the same inputs.

    ``special`` holds what one of them is told besides, or, under a name of its own, is told alone.
    """

    name: str
    head: str  # of the class: AutoModelFor...; empty for AutoModel
    inputs: Callable[[torch.Generator], Inputs]
    options: Options
    architectures: str
    special: dict[str, Options] = field(default_factory=dict)


def _ids(generator: torch.Generator, length: int) -> Tensor:
    return torch.randint(3, 90, (_BATCH, length), generator=generator)


def _text(generator: torch.Generator) -> Inputs:
    ids = _ids(generator, 16)
    return {"input_ids": ids, "labels": ids}


def _text_pair(generator: torch.Generator) -> Inputs:
    return {"input_ids": _ids(generator, 16), "labels": _ids(generator, 9)}


def _pixels(generator: torch.Generator, *sizes: int) -> Inputs:
    return {
        "pixel_values": torch.randn(_BATCH, *sizes, generator=generator),
        "labels": torch.arange(_BATCH) + 1,
    }


def _image(generator: torch.Generator, side: int = 32) -> Inputs:
    return _pixels(generator, 3, side, side)


def _video(generator: torch.Generator) -> Inputs:
    return _pixels(generator, 4, 3, 32, 32)


def _image_alone(generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(_BATCH, 3, 32, 32, generator=generator)}


def _image_and_text(generator: torch.Generator, length: int = 64) -> Inputs:
    return {**_image_alone(generator), "input_ids": _ids(generator, length), "return_loss": True}


def _image_in_text(generator: torch.Generator) -> Inputs:
    ids = _ids(generator, 24)
    ids[:, :16] = _VOCABULARY - 1  # where the patches go
    return {**_image_alone(generator), "input_ids": ids, "labels": ids}


def _wave(generator: torch.Generator) -> Inputs:
    return {
        "input_values": torch.randn(_BATCH, 1600, generator=generator),
        "labels": torch.randint(3, 30, (_BATCH, 4), generator=generator),
    }


def _spectrum(generator: torch.Generator) -> Inputs:
    return {"input_values": torch.randn(_BATCH, 32, 16, generator=generator), "labels": torch.arange(_BATCH)}


def _features(generator: torch.Generator) -> Inputs:
    return {
        "input_features": torch.randn(_BATCH, 16, 40, generator=generator),
        "labels": _ids(generator, 6),
    }


FAMILIES = (
    Family(
        "decoder", "CausalLM", _text, _TEXT,
        "gpt2 gpt_bigcode opt bloom falcon gpt_neox gpt_neox_japanese mpt xglm biogpt ctrl openai-gpt gptj "
        "codegen gpt_neo",
        {
            "gptj": {"rotary_dim": 4},
            "codegen": {"rotary_dim": 4},
            "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
        },
    ),
    Family(
        "decoder", "CausalLM", _text,
        {"vocab_size": _VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "xlnet",
    ),
    Family(
        "decoder", "CausalLM", _text, _GROUPED,
        "llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 stablelm starcoder2 cohere "
        "cohere2 olmo olmo2 olmo3 granite glm glm4 helium smollm3 nemotron persimmon arcee seed_oss exaone4 "
        "ernie4_5 apertus bitnet diffllama hunyuan_v1_dense vaultgemma",
        {name: {"head_dim": 8} for name in ("helium", "hunyuan_v1_dense", "ministral")},
    ),
    Family(
        "mixture of experts", "CausalLM", _text, _EXPERTS,
        "mixtral qwen2_moe qwen3_moe olmoe phimoe granitemoe granitemoeshared gpt_oss ernie4_5_moe glm4_moe "
        "jetmoe flex_olmo afmoe doge dots1 lfm2_moe hunyuan_v1_moe",
        {
            "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
            "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
            "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": [2, 2], "num_shared_expert": [1, 1]},
        },
    ),
    Family("mixture of experts", "CausalLM", _text, _DEEPSEEK, "deepseek_v2 deepseek_v3"),
    Family(
        "state space or linear attention", "CausalLM", _text, _EXPERTS,
        "mamba falcon_mamba falcon_h1 rwkv nemotron_h lfm2 minimax granitemoehybrid bamba jamba "
        "recurrent_gemma qwen3_next",
        {
            "granitemoehybrid": {
                **_MAMBA2, "layer_types": ["linear_attention", "full_attention"],
                "shared_intermediate_size": 24,
            },
            "falcon_h1": {
                **_MAMBA2, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_chunk_size": 8,
            },
            "bamba": {**_MAMBA2, "mamba_n_groups": 1, "attn_layer_indices": [1]},
            "jamba": {
                "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
                "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
            },
            "recurrent_gemma": {
                "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8,
                "block_types": ["recurrent", "recurrent", "attention"],
            },
            "qwen3_next": {
                "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24,
                "layer_types": ["linear_attention", "full_attention"],
            },
        },
    ),
    Family(
        "state space or linear attention", "CausalLM", _text,
        {
            "vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8,
            "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8,
        },
        "mamba2",
    ),
    Family(
        "encoder", "MaskedLM", _text, _TEXT,
        "bert roberta albert electra distilbert deberta deberta-v2 mpnet camembert xlm-roberta roformer "
        "rembert convbert ibert nystromformer yoso megatron-bert layoutlm longformer big_bird fnet xlm "
        "flaubert esm modernbert ernie data2vec-text mra eurobert squeezebert mobilebert luke",
        {
            "squeezebert": {"embedding_size": 32}
            | {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
            "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
            "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
        },
    ),
    Family(
        "encoder", "MaskedLM", _text,
        {
            "vocab_size": _VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48,
            "block_sizes": [1, 1], "num_decoder_layers": 1,
        },
        "funnel",
    ),
    Family(
        "encoder-decoder", "Seq2SeqLM", _text_pair, _BOTH_WAYS,
        "bart mbart pegasus blenderbot blenderbot-small marian m2m_100 plbart led bigbird_pegasus pegasus_x "
        "mvp nllb-moe",
    ),
    Family("encoder-decoder", "Seq2SeqLM", _text_pair, _T5, "t5 mt5 umt5 switch_transformers longt5"),
    Family(
        "image", "ImageClassification", _image, _IMAGE,
        "vit beit data2vec-vision dinov2 dinov2_with_registers vit_msn ijepa",
    ),
    Family("image", "ImageClassification", _image, _SWIN, "swin swinv2"),
    Family(
        "image", "ImageClassification", partial(_image, side=64), _TWO_STAGES,
        "convnext convnextv2 resnet regnet focalnet",
        {
            "convnext": {"num_stages": 2},
            "convnextv2": {"num_stages": 2},
            "resnet": {"embedding_size": 8, "layer_type": "bottleneck"},
            "regnet": {"embedding_size": 8, "groups_width": 4},
            "focalnet": {"image_size": 64, "embed_dim": 8, "focal_levels": [1, 1], "focal_windows": [3, 3]},
        },
    ),
    Family("image", "ImageClassification", _image, _PYRAMID, "pvt pvt_v2 segformer"),
    Family(
        "image", "ImageClassification", partial(_image, side=64), _FOUR_STAGES, "poolformer bit swiftformer",
        {
            "bit": {"embedding_size": 8, "num_groups": 4, "hidden_sizes": [8, 16, 16, 16]},
            "swiftformer": {"image_size": 64, "embed_dims": [8, 8, 16, 16]},
        },
    ),
    Family(
        "image", "ImageClassification", partial(_image, side=64), {"num_labels": 5},
        "mobilenet_v1 mobilevit mobilevitv2",
        {
            "mobilenet_v1": {"depth_multiplier": 0.25, "min_depth": 8},
            "mobilevit": {
                "image_size": 64, "patch_size": 2, "hidden_sizes": [16, 16, 16], "num_attention_heads": 2,
                "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 16],
            },
            "mobilevitv2": {"image_size": 64, "width_multiplier": 0.1},
        },
    ),
    Family(
        "image", "PreTraining", _image_alone,
        {
            **_IMAGE, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24,
        },
        "vit_mae",
    ),
    Family(
        "video", "VideoClassification", _video, {**_IMAGE, "num_frames": 4, "tubelet_size": 2},
        "videomae timesformer vivit", {"vivit": {"tubelet_size": [2, 8, 8]}},
    ),
    Family(
        "image and text", "", _image_and_text, {"text_config": _TEXT, "vision_config": _IMAGE}, "clip siglip",
        {"clip": {"projection_dim": 16}},
    ),
    Family(
        "image and text", "ImageTextToText", _image_in_text,
        {
            "text_config": {**_GROUPED, "model_type": "llama"},
            "vision_config": {**_IMAGE, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": _VOCABULARY - 1,
        },
        "llava",
    ),
    Family(
        "audio", "CTC", _wave, _WAVE,
        "wav2vec2 hubert wavlm data2vec-audio unispeech unispeech-sat sew sew-d wav2vec2-conformer",
    ),
    Family(
        "audio", "AudioClassification", _spectrum,
        {
            **_IMAGE, "num_mel_bins": 16, "max_length": 32, "frequency_stride": 8, "time_stride": 8,
        },
        "audio-spectrogram-transformer",
    ),
    Family(
        "audio", "SpeechSeq2Seq", _features,
        {**_BOTH_WAYS, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
        "whisper",
    ),
)  # fmt: skip


def groups() -> Iterator[Group]:
    """One architecture, one case: training, with the dropout that it comes with."""
    for family in FAMILIES:
        for architecture in family.architectures.split():
            name = f"{architecture} ({family.name})"
            yield Group(name, partial(_cases, family, architecture, name))


def _cases(family: Family, architecture: str, name: str) -> Iterator[Case]:
    yield Case(name, partial(_subject, family, architecture))


def _subject(family: Family, architecture: str) -> Subject:
    import transformers

    seed()
    options = {**family.options, **family.special.get(architecture, {})}
    config = transformers.AutoConfig.for_model(architecture, **options)
    head = f"For{family.head}" if family.head else ""
    model = getattr(transformers, f"AutoModel{head}").from_config(config).train()
    given = family.inputs(torch.Generator().manual_seed(SEED))
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9)

    def forward() -> Inputs:
        output = model(**passing(given))
        logits = [output[name] for name in ("logits", "logits_per_image") if name in output]
        return {"loss": output.loss, "logits": [item.detach() for item in logits]}

    fixed = dict(named_tensors(given)) | dict(model.named_buffers())
    return Subject(forward, dict(model.named_parameters()), fixed, model, optimizer.step)
