"""Network: what the benchmark needs to know of one model, and the options that shape it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_CLASSES = 1000


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """What shapes a network and its batch; each network reads the fields that it knows.

    ``image_size`` is the edge in pixels (voxels for volumes). ``hidden`` to ``vocab`` are the
    language model's, ``width`` and ``norm`` the U-Net's. ``heads`` and ``kv_heads`` of 0 mean:
    one head per 128 hidden units, and as many key/value heads as heads.
    """

    batch_size: int
    image_size: int
    dtype: torch.dtype = torch.float32
    hidden: int = 2048
    layers: int = 24
    heads: int = 0
    kv_heads: int = 0
    sequence: int = 4096
    vocab: int = 32000
    width: int = 16
    norm: str = "instance"


Batch = tuple[Any, Any]
MakeBatch = Callable[[NetworkOptions, torch.device, torch.Generator], Batch]
Loss = Callable[[Any, Any], Tensor]
Factory = Callable[[NetworkOptions], nn.Module | tuple[nn.Module, MakeBatch]]


@dataclass(frozen=True, slots=True)
class Network:
    """One entry of the registry.

    ``factory`` returns a module, or a module and its own batch maker, which then replaces
    ``make_batch``. Speed is counted in ``unit`` per second; one sample is
    ``items_per_sample(options)`` of them.
    """

    name: str
    description: str
    factory: Factory
    make_batch: MakeBatch
    loss: Loss
    default_batch_size: int
    default_image_size: int = 0
    least_image_size: int = 0
    default_optimizer: str = "sgd"
    unit: str = "images"
    items_per_sample: Callable[[NetworkOptions], int] = lambda options: 1
    data_format: str = "NCHW"
    users_own: bool = False  # none of ours: what it raises may be its author's to mend

    def build(self, options: NetworkOptions, device: torch.device) -> tuple[nn.Module, MakeBatch]:
        """The module in training mode, made on ``device`` and cast to ``options.dtype``."""
        with device:  # initialise where it will live: a large model takes minutes on the CPU
            made = self.factory(options)
        module, make_batch = made if isinstance(made, tuple) else (made, self.make_batch)
        return module.to(device=device, dtype=options.dtype).train(), make_batch

    def items_per_step(self, options: NetworkOptions) -> int:
        return options.batch_size * self.items_per_sample(options)


def image_batch(channels: int = 3, classes: int = IMAGE_CLASSES) -> MakeBatch:
    """A maker of random images and labels."""

    def make(options: NetworkOptions, device: torch.device, generator: torch.Generator) -> Batch:
        size = (options.batch_size, channels, options.image_size, options.image_size)
        images = torch.randn(size, device=device, generator=generator).to(options.dtype)
        labels = torch.randint(0, classes, (options.batch_size,), device=device, generator=generator)
        return images, labels

    return make


def classification_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, in float32 whatever the model's type."""
    return F.cross_entropy(output.float(), target)
