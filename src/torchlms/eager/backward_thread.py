"""Backward thread: does something where autograd will run the backward pass.

[Note: Threads of cuDNN]
What cuDNN has chosen for a convolution torch keeps by thread, and autograd runs the nodes of a CUDA device in
a thread of its own: what one thread has computed in forward another makes again, by its own choice. The two
agree if both had the same room, and nothing promises that they do. So a recipe is tried in the thread in
which it will run. That has that thread choose while there is still something to compare with, and it keeps to
its choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from torchlms.eager import private

Result = TypeVar("Result")


class _Node(torch.autograd.Function):
    """A node with nothing to compute, of which only the backward part matters."""

    @staticmethod
    def forward(ctx: Any, beginning: torch.Tensor, deed: Callable[[], None]) -> torch.Tensor:
        ctx.deed = deed
        return torch.empty_like(beginning)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, None]:
        ctx.deed()
        return None, None


def run_as_backward(device: torch.device, deed: Callable[[], Result]) -> Result:
    """What ``deed`` returns or raises, done as a backward pass on ``device`` would do it: by its thread, on
    the current stream. Here and now where a backward pass runs already, or none can be run."""
    if device.type == "cpu" or private.in_backward() or not _can_run_backward():
        return deed()
    return _as_backward(device, deed)


def _can_run_backward() -> bool:
    if torch.is_inference_mode_enabled() or private.compiled_autograd():
        return False
    return private.functorch_interpreter() is None


def _as_backward(device: torch.device, deed: Callable[[], Result]) -> Result:
    results: list[Result] = []
    errors: list[BaseException] = []

    def caught() -> None:
        # What raises in a node leaves the rest of its graph waiting until the next backward pass.
        try:
            results.append(deed())
        except BaseException as error:
            errors.append(error)

    with private.unwatched(), torch.enable_grad():
        beginning = torch.empty(0, device=device, requires_grad=True)  # takes no memory, and no kernel
        end = _Node.apply(beginning, caught)  # type: ignore[no-untyped-call]
        torch.autograd.backward((end,), (end.detach(),))
    if errors:
        try:
            raise errors.pop()
        finally:
            results.clear()
    return results.pop()
