"""Samples: calls that bring many ops about, forward and backward.

Torch's own operator samples (which torch does not promise to keep), and before them larger ones of the
ops that networks are made of, since small samples hide what several threads or blocks do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

Sample = Callable[[], Any]  # runs; what it returns is summed and differentiated

_MOST_SAMPLES = 4  # of each of torch's operators
_MOST_ELEMENTS = 1 << 20
_TYPES = (torch.float32, torch.bfloat16)


def all_samples(device: torch.device) -> Iterator[tuple[str, Sample]]:
    """Name and call, the most important first."""
    yield from _of_networks(device)
    yield from _of_torch(device)


def _of_networks(device: torch.device) -> Iterator[tuple[str, Sample]]:
    for dtype in _TYPES:
        for name, sample in (*_pointwise(device, dtype), *_layers(device, dtype)):
            yield f"{name} {dtype}", sample


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()


_POINTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu, "elu": F.elu, "hardtanh": F.hardtanh, "hardswish": F.hardswish,
    "mish": F.mish, "softplus": F.softplus, "exp": torch.exp, "neg": torch.neg, "clone": torch.clone,
    "square": torch.square, "rsqrt": lambda x: torch.rsqrt(x.square() + 1),
    "pow": lambda x: x.square().pow(0.75), "scaled": lambda x: x * 2 + 1, "halved": lambda x: x / 3 - 1,
    "added": lambda x: x + x * x, "cast": lambda x: x.to(torch.float32), "clamp": lambda x: x.clamp(-1, 1),
    "in_place": lambda x: F.relu((x * 2).add_(1).mul_(0.5), inplace=True),
    "narrow": lambda x: x.to(torch.bfloat16), "cat": lambda x: torch.cat([x, x], 0),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(), "mean": lambda x: x.mean(-1),
    "sum": lambda x: x.sum(-1), "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1), "where": lambda x: torch.where(x > 0, x, -x),
}  # fmt: skip


def _pointwise(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    tensors = (_random(device, dtype, 8, 64, 28, 28), _random(device, dtype, 512, 768))
    for name, function in _POINTWISE.items():
        for tensor in tensors:
            yield name, partial(function, tensor)


def _layers(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    make = partial(_random, device, dtype)
    image, rows, sequence = make(8, 64, 28, 28), make(512, 768), make(4, 8, 128, 64)
    scale, shift, wide, wide_shift = make(64), make(64), make(768), make(768)
    means, spreads = torch.zeros(64, device=device), torch.ones(64, device=device)
    yield "batch_norm", partial(F.batch_norm, image, means, spreads, scale, shift, training=True)
    yield "group_norm", partial(F.group_norm, image, 8, scale, shift)
    yield "layer_norm", partial(F.layer_norm, rows, (768,), wide, wide_shift)
    yield "rms_norm", partial(F.rms_norm, rows, (768,), wide)
    yield "max_pool", partial(F.max_pool2d, image, 3, 2, 1)
    yield "avg_pool", partial(F.avg_pool2d, image, 2)
    yield "adaptive_pool", partial(F.adaptive_avg_pool2d, image, 1)
    yield "upsample", partial(F.interpolate, image, scale_factor=2, mode="nearest")
    yield "bilinear", partial(F.interpolate, image, scale_factor=2, mode="bilinear")
    yield "dropout", partial(F.dropout, rows, 0.1)
    yield "attention", partial(F.scaled_dot_product_attention, sequence, sequence, sequence)
    yield "linear", partial(F.linear, rows, make(512, 768))
    # Many rows added to few places, by several threads at once: small samples do not show the disorder.
    few, many = make(8, 64), make(4096, 64)
    places = torch.arange(4096, device=device) % 8
    for _ in range(4):
        yield "colliding", partial(torch.index_put, few, (places,), many, accumulate=True)
        yield "colliding", partial(torch.ops.aten._unsafe_index_put, few, [places], many, True)
        yield (
            "colliding",
            partial(torch.Tensor.index_put_, few.detach().clone(), (places,), many.detach(), True),
        )
        yield "colliding", partial(torch.index_add, few, 0, places, many)
        yield "colliding", partial(F.embedding, places, few)
    yield "convolution", partial(F.conv2d, image, make(64, 64, 3, 3), padding=1)


def _of_torch(device: torch.device) -> Iterator[tuple[str, Sample]]:
    from torch.testing._internal.common_methods_invocations import op_db

    for info in op_db:
        for dtype in _TYPES:
            if dtype in info.supported_dtypes(device.type):
                yield from _of_operator(info, device, dtype)


def _of_operator(info: Any, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    gradients = dtype in info.supported_backward_dtypes(device.type) and info.supports_autograd
    try:
        samples = list(
            itertools.islice(info.sample_inputs(device, dtype, requires_grad=gradients), _MOST_SAMPLES)
        )
    except Exception:  # a sample that cannot be made here says nothing of any op
        return
    for sample in samples:
        first = sample.input
        if isinstance(first, torch.Tensor) and (
            first.numel() > _MOST_ELEMENTS or first.layout != torch.strided
        ):
            continue
        yield f"{info.name} {dtype}", partial(info.op, first, *sample.args, **sample.kwargs)
