"""unet3d: a 3D U-Net for volumes like BRATS, four scans in and three tissue classes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlms.errors import BadOption

if TYPE_CHECKING:
    from torchlms.bench.networks.network import Batch, NetworkOptions

_CHANNELS = 4
_CLASSES = 3
_LEVELS = 4


class DoubleConv(nn.Module):
    """Twice: 3x3x3 convolution, norm, in-place ReLU."""

    def __init__(self, inputs: int, outputs: int, *, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, padding=1, bias=False),
            _norm(norm, outputs),
            nn.ReLU(inplace=True),
            nn.Conv3d(outputs, outputs, 3, padding=1, bias=False),
            _norm(norm, outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


class UNet3d(nn.Module):
    """``width`` channels at full resolution, twice as many at each of the three levels below."""

    def __init__(self, *, width: int = 16, norm: str = "instance") -> None:
        super().__init__()
        widths = [width << level for level in range(_LEVELS)]
        self.down = nn.ModuleList(
            DoubleConv(inputs, outputs, norm=norm)
            for inputs, outputs in zip([_CHANNELS, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool3d(2)
        upward = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.widen = nn.ModuleList(nn.ConvTranspose3d(low, high, 2, stride=2) for low, high in upward)
        self.up = nn.ModuleList(DoubleConv(2 * high, high, norm=norm) for _, high in upward)
        self.head = nn.Conv3d(width, _CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()  # the bottom goes up directly
        for widen, block in zip(self.widen, self.up, strict=True):
            x = block(torch.cat([widen(x), skips.pop()], 1))
        logits: Tensor = self.head(x)
        return logits


def make_unet3d(options: NetworkOptions) -> nn.Module:
    if options.image_size % (1 << (_LEVELS - 1)):
        raise BadOption(f"--image-size {options.image_size}: unet3d halves three times; give a multiple of 8")
    return UNet3d(width=options.width, norm=options.norm)


def volume_batch(options: NetworkOptions, device: torch.device, generator: torch.Generator) -> Batch:
    """Random volumes and a class per voxel."""
    edges = (options.image_size,) * 3
    volumes = torch.randn((options.batch_size, _CHANNELS, *edges), device=device, generator=generator)
    labels = torch.randint(0, _CLASSES, (options.batch_size, *edges), device=device, generator=generator)
    return volumes.to(options.dtype), labels


def voxel_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy per voxel.

    One row per voxel, because CUDA's spatial form adds up atomically: its bits differ run by run.
    """
    rows = output.float().movedim(1, -1).reshape(-1, output.shape[1])
    return F.cross_entropy(rows, target.reshape(-1))


def _norm(name: str, channels: int) -> nn.Module:
    if name == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if name == "batch":
        return nn.BatchNorm3d(channels)
    raise BadOption(f"--norm {name}: choose instance or batch")
