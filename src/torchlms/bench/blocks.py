"""Blocks: where activation checkpointing cuts a model, for the rivals of the benchmark."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchlms.errors import NotSupported

if TYPE_CHECKING:
    from torchlms.bench.workload import ForwardContext

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_FEWEST_BLOCKS = 2
_FEWEST_LAYERS = 3


class Checkpointed(nn.Module):
    """A block whose activations are made again in the backward pass.

    As anywhere with ``torch.utils.checkpoint``, BatchNorm's running statistics move twice a step.
    """

    def __init__(self, block: nn.Module, around: ForwardContext) -> None:
        super().__init__()
        self.block = block
        self._around = around

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._around():
            return checkpoint(self.block, *args, use_reentrant=False, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # a model may ask its block for more than forward
            return getattr(super().__getattr__("block"), name)


def checkpoint_blocks(model: nn.Module, around: ForwardContext = contextlib.nullcontext) -> int:
    """Checkpoint each block of ``model``, in place; returns how many.

    The blocks are all modules of the class that fills the longest chain of submodules with
    structure of their own (residual blocks, inception modules, decoder layers). A model that is one
    long Sequential of plain layers is cut into about sqrt(n) pieces instead.
    """
    kind = _block_class(model)
    if kind is not None:
        return _wrap_class(model, kind, around)
    chains = [(len(chain), owner, name, list(chain)) for owner, name, chain in _sequences(model)]
    if not chains or max(chains, key=lambda chain: chain[0])[0] < _FEWEST_LAYERS:
        raise NotSupported(f"checkpoint: {type(model).__name__} has no chain of blocks to checkpoint")
    _, owner, name, layers = max(chains, key=lambda chain: chain[0])
    pieces = _pieces(layers)
    wrapped = [Checkpointed(nn.Sequential(*piece), around) for piece in pieces]
    if name:
        setattr(owner, name, nn.Sequential(*wrapped))
    else:  # the model itself is the chain
        for key in range(len(layers)):
            delattr(owner, str(key))
        for index, block in enumerate(wrapped):
            owner.add_module(str(index), block)
    return len(wrapped)


def _block_class(model: nn.Module) -> type[nn.Module] | None:
    best: list[type[nn.Module]] = []
    for module in model.modules():
        chain = [
            type(child)
            for child in module.children()
            if not isinstance(child, _CONTAINERS) and next(child.children(), None) is not None
        ]
        best = max(best, chain, key=len)
    return max(best, key=best.count) if len(best) >= _FEWEST_BLOCKS else None


def _wrap_class(module: nn.Module, kind: type[nn.Module], around: ForwardContext) -> int:
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, kind):
            setattr(module, name, Checkpointed(child, around))
            count += 1
        else:
            count += _wrap_class(child, kind, around)
    return count


def _sequences(model: nn.Module) -> list[tuple[nn.Module, str, nn.Sequential]]:
    """(owner, attribute, chain) of every Sequential; the model itself has the attribute ``""``."""
    found: list[tuple[nn.Module, str, nn.Sequential]] = []
    if isinstance(model, nn.Sequential):
        found.append((model, "", model))
    for owner in model.modules():
        found += [(owner, name, c) for name, c in owner.named_children() if isinstance(c, nn.Sequential)]
    return found


def _pieces(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Pieces of about sqrt(n) layers, each starting at a layer with weights.

    So an in-place ReLU stays with the convolution before it and never writes a piece's saved input.
    """
    length = math.isqrt(len(layers))
    pieces: list[list[nn.Module]] = [[]]
    for layer in layers:
        has_weights = any(isinstance(weight, torch.Tensor) for weight in layer.parameters())
        if len(pieces[-1]) >= length and has_weights:
            pieces.append([])
        pieces[-1].append(layer)
    return pieces
