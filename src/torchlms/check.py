"""Check: one step plainly, and one in which everything leaves and comes back; the same bits, or an error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from torchlms.errors import BadOption, NotSupported, VerifyFailed

if TYPE_CHECKING:
    from torchlms.eager.engine import Engine
    from torchlms.eager.install import Installation

log = logging.getLogger("torchlms")

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The bits that one step left: loss, gradients and buffers, by name."""

    tensors: dict[str, torch.Tensor]

    def difference(self, other: _Outcome) -> str:
        """The name of the first tensor that has other bits; empty if none has."""
        for name in {**self.tensors, **other.tensors}:
            ours, theirs = self.tensors.get(name), other.tensors.get(name)
            if ours is None or theirs is None or not _same_bits(ours, theirs):
                return name
        return ""


def check_step(step: Step, model: torch.nn.Module, engine: Engine, installation: Installation) -> int:
    """Three runs of ``step`` from the same state: plainly twice, and with everything away in between.

    Returns how many values came back. Raises VerifyFailed, or NotSupported where nothing can be said.
    """
    device = engine.device.torch_device
    with _taken_off(installation):
        plain, again = (_outcome(step, model, device) for _ in range(2))
    unstable = plain.difference(again)
    if unstable:
        raise NotSupported(
            f"without LMS two runs of the step already differ in {unstable}: nothing can be said. Try "
            "torch.use_deterministic_algorithms(True), and a step that draws its batch from nowhere else"
        )
    with _emptied(engine, installation):
        came_back = engine.comings
        ours = _outcome(step, model, device)
        came_back = engine.comings - came_back
    wrong = plain.difference(ours)
    if wrong:
        raise VerifyFailed(
            f"with everything away between forward and backward, {wrong} has other bits than in the plain "
            f"run ({came_back} values came back): do not train this network with LMS, and please report it"
        )
    if not came_back:
        raise NotSupported(
            "nothing left the device in this step, so that nothing was checked: a larger batch?"
        )
    log.info(
        "checked: %d values left and came back; loss, gradients and buffers have the same bits", came_back
    )
    return came_back


def _outcome(step: Step, model: torch.nn.Module, device: torch.device) -> _Outcome:
    """What ``step`` leaves; the model and the generators are as before afterwards."""
    generators = [device] if device.type == "cuda" else []  # beside the CPU's
    with _restored(model), torch.random.fork_rng(generators):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss = step()
        if not isinstance(loss, torch.Tensor):
            raise BadOption(f"check() wants a step that returns its loss; this one returned {loss!r}")
        for name, parameter in model.named_parameters():
            if not _same_bits(parameter, before[name]):
                raise BadOption(f"the step changed {name}: leave the optimizer out of what check() runs")
        found = {"the loss": loss.detach().clone()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"the gradient of {name}"] = parameter.grad.detach().clone()
        for name, buffer in model.named_buffers():
            found[f"the buffer {name}"] = buffer.detach().clone()
    return _Outcome(found)


@contextmanager
def _restored(model: torch.nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    lasting = [(item, item.detach().clone()) for item in (*model.parameters(), *model.buffers())]
    for parameter, gradient in gradients:
        parameter.grad = gradient.clone() if gradient is not None else None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for item, before in lasting:
                if not _same_bits(item, before):
                    item.copy_(before)


@contextmanager
def _taken_off(installation: Installation) -> Iterator[None]:
    was_on = installation.on
    installation.take_off()
    try:
        yield
    finally:
        if was_on:
            installation.put_on()


@contextmanager
def _emptied(engine: Engine, installation: Installation) -> Iterator[None]:
    was_on = installation.on
    if not was_on:
        installation.put_on()
    engine.saver.empty_before_backward = True
    try:
        yield
    finally:
        engine.saver.empty_before_backward = False
        if not was_on:
            installation.take_off()


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    one, other = (item.detach().contiguous().reshape(-1).view(torch.uint8) for item in (left, right))
    return bool(torch.equal(one, other))
