"""Workload: model, optimizer, one synthetic batch and the training step, the same bits every time."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchlms.bench.networks.blame import blamed
from torchlms.errors import BadOption

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.bench.networks import Network
    from torchlms.bench.networks.network import Loss
    from torchlms.bench.options import BenchOptions

    ForwardContext = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(slots=True)
class Workload:
    """What one step needs. ``around_forward`` is entered anew around each forward pass."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Any
    target: Any
    loss: Loss
    device: torch.device
    around_forward: ForwardContext = contextlib.nullcontext
    users_own: str = ""  # the factory that gave model and batch, if it is none of ours

    def step(self) -> Tensor:
        """Forward, backward, update. Returns the loss, detached."""
        with self.around_forward():
            loss = self._forward()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _forward(self) -> Tensor:
        with blamed(self._failed) if self.users_own else contextlib.nullcontext():
            return self.loss(self.model(self.inputs), self.target)

    def _failed(self, error: str) -> str:
        return (
            f"--model {self.users_own}: its forward pass failed with inputs {_shapes(self.inputs)} and "
            f"target {_shapes(self.target)}: {error}. Its make_batch says what it is fed, images of "
            "--image-size where it has none; torchlms --debug shows where it failed"
        )


def _shapes(batch: Any) -> str:
    """Of the tensors of a batch, for people."""
    if isinstance(batch, Tensor):
        return str(list(batch.shape))
    if isinstance(batch, dict):
        return ", ".join(f"{name} {_shapes(item)}" for name, item in batch.items())
    if isinstance(batch, (list, tuple)):
        return ", ".join(map(_shapes, batch))
    return type(batch).__name__


def make_workload(network: Network, options: BenchOptions) -> Workload:
    """Everything on the device, seeded: two calls give the same bits."""
    device = options.torch_device()
    sizes = options.network_options()
    torch.manual_seed(options.seed)
    model, make_batch = network.build(sizes, device)
    generator = torch.Generator(device).manual_seed(options.seed)
    inputs, target = make_batch(sizes, device, generator)
    optimizer = make_optimizer(model, options)
    # Dropout starts from here, however many numbers the initialisation drew.
    torch.manual_seed(options.seed)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what initialisation and casting left behind
    own = network.name if network.users_own else ""
    return Workload(model, optimizer, inputs, target, network.loss, device, users_own=own)


def make_optimizer(model: nn.Module, options: BenchOptions) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 at 0.01, or Adam or AdamW at 0.0003."""
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=options.learning_rate or 0.01, momentum=0.9)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=options.learning_rate or 3e-4)
    if options.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=options.learning_rate or 3e-4)
    raise BadOption(f"--optimizer {options.optimizer}: choose sgd, adam or adamw")
