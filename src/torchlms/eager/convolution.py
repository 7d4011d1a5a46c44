"""The room a convolution needs around it, so that cuDNN is never starved.

[Note: Starved convolutions]
When a convolution's workspace cannot be allocated no error comes. The caller of cuDNN swallows it,
takes another algorithm (other bits, three to six times slower) and keeps that one for this shape
for the life of the thread. So room is made *before* the op, never after:

- A shape met for the first time is given ample room: its results and eight times the bytes of all
  its operands and results, which evicts whatever can go. Measured need is about once that for most
  (layout changes of operands and results), and three times for 5x5 kernels that go through an FFT;
  with twice, these were starved. What it really used is recorded.
- From then on the known need is reserved before each call: results and workspace are allocated in
  the op's own order and freed at once, until they lie in the same places twice, so that the allocator
  will place them there again (see [Note: Twice in the same place]). If that fails we evict and reserve
  again; the failure meets our own allocation, not cuDNN's. If there is nothing left to evict, that is an
  error where deterministic kernels were asked for, and else a warning.
- Not held to this are convolutions that we do not see: inside compiled regions and in other threads.
  With ``torch.backends.cudnn.benchmark`` cuDNN tries what fits, so that its choice, and with it the
  bits, may depend on the budget.
- The allocator tells of each allocation that fails. Those inside a convolution that raised nothing have
  starved it (``eager/workspaces.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchlms.eager.per_op import PerOp
from torchlms.eager.sizes import Key, ResultSizes
from torchlms.eager.traits import name_of

_AMPLE_FACTOR = 8
_AMPLE_FLOOR_BYTES = 1 << 30

# Process-wide: cuDNN's own choices are by thread, but where there is room all threads choose alike.
_KNOWN_BLOCKS: dict[Key, tuple[int, ...]] = {}
# Of these, those for which cuDNN had too little room when it chose: in a thread that has not met them yet it
# may find too little again, and choose alike.
_CHOSEN_SHORT: set[Key] = set()

_NAMES = (
    "convolution",
    "convolution_backward",
    "cudnn_convolution",
    "cudnn_convolution_transpose",
    "cudnn_convolution_relu",
    "cudnn_convolution_add_relu",
    "miopen_convolution",
)


def is_convolution(name: str) -> bool:
    """Whether the kernel of an op of that name, as tapes give it, is chosen by how much memory is free."""
    return name.removeprefix("aten.").partition(".")[0] in _NAMES


def blocks_of(results_bytes: Sequence[int], scratch_bytes: int) -> tuple[int, ...]:
    """What a convolution allocates, in its order, if it used ``scratch_bytes`` beyond its results: that much,
    if all of them were there when it used the most. The workspace for the first of them may have been there
    before the others, and in one piece larger by those."""
    workspace_bytes = scratch_bytes + sum(results_bytes[1:]) if scratch_bytes else 0
    return (*results_bytes, workspace_bytes)


class ConvolutionRoom:
    """Knows what each convolution needs, and reserves it."""

    def __init__(self, sizes: ResultSizes) -> None:
        self._sizes = sizes
        # Whether an op is a convolution.
        self.concerns = PerOp(lambda func: is_convolution(name_of(func)))
        self._flags = _flags()
        self.starved = 0

    def begin_step(self) -> None:
        """Look at the switches that change which algorithm is chosen; not at every op."""
        self._flags = _flags()

    def need(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[int, ...], bool]:
        """Blocks to reserve before this call, in bytes and in the op's order; and whether they are what a
        call like it has been measured to take in this process."""
        known = _KNOWN_BLOCKS.get(_key(func, args, self._flags))
        if known is not None:
            return known, True
        results = self._sizes.of(func, args, kwargs)
        operands = sum(arg.untyped_storage().nbytes() for arg in args if isinstance(arg, torch.Tensor))
        return (*results, _AMPLE_FACTOR * (operands + sum(results)) + _AMPLE_FLOOR_BYTES), False

    def learn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scratch_bytes: int) -> None:
        """Remember what this call used beyond its results."""
        key = _key(func, args, self._flags)
        before = _KNOWN_BLOCKS.get(key)
        *results, workspace_bytes = blocks_of(self._sizes.of(func, args, kwargs), scratch_bytes)
        _KNOWN_BLOCKS[key] = (*results, max(workspace_bytes, before[-1] if before else 0))

    def note_short(self, func: Any, args: tuple[Any, ...]) -> None:
        """Such a call was starved when it was met for the first time."""
        _CHOSEN_SHORT.add(_key(func, args, self._flags))

    def chosen_short(self, func: Any, args: tuple[Any, ...]) -> bool:
        return _key(func, args, self._flags) in _CHOSEN_SHORT

    @staticmethod
    def chooses_once(func: Any) -> bool:
        """Whether a call of ``func`` that raised has left no choice behind: the backward pass makes one for
        each of its gradients."""
        return "backward" not in name_of(func)


def _key(func: Any, args: tuple[Any, ...], flags: tuple[bool, ...]) -> Key:
    """What cuDNN's choice depends on. Called at every convolution, so it does little."""
    parts: list[Any] = [name_of(func), flags]
    for arg in args:
        if isinstance(arg, torch.Tensor):
            parts += (arg.shape, arg.stride(), arg.dtype)
        else:
            parts.append(tuple(arg) if isinstance(arg, (list, tuple)) else arg)
    return tuple(parts)


def _flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
