"""Graph: which nodes of autograd belong to one micro-step, so that going on can be told from beginning anew.

A loss made of gradients (a penalty on the slope, a meta-learner's outer loss) is computed after a backward
pass and out of the same graph. The next step's first layer is computed after a backward pass, too, but out of
inputs and parameters. After a pass that is itself differentiable everything belongs together until one comes
that is not, or the optimizer steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchlms.eager import private

if TYPE_CHECKING:
    import torch

_LOOKED_AT = 256  # nodes on the way back: a graph that goes on leads to its own within a few
_MOST_PASSES = 16  # a graph that never ends, such as a state carried from step to step, is cut here


class Graph:
    """The nodes that a thread made between the backward passes of one micro-step and those of the next."""

    __slots__ = ("_first", "_goes_on", "_last", "_passes", "_steps")

    def __init__(self, before: Graph | None = None) -> None:
        self._first: int = before._last if before is not None else 0
        self._last: int = self._first
        self._passes = 0
        self._steps = 0  # of the optimizer, when a backward pass last began
        self._goes_on = False

    def gone_through(self, optimizer_steps: int, *, goes_on: bool) -> None:
        """A backward pass goes through it: what was made until now is of this micro-step. ``goes_on``: the
        pass is itself part of a graph (``create_graph``), which another pass will go through."""
        self._last = private.nodes_made()
        self._passes += 1
        self._steps = optimizer_steps
        self._goes_on = goes_on

    def goes_on_to(self, tensor: torch.Tensor, optimizer_steps: int) -> bool:
        """Whether ``tensor`` comes out of this graph, or is to be gone through together with it, and no
        optimizer's step has ended it."""
        if self._passes > _MOST_PASSES or optimizer_steps != self._steps:
            return False
        if self._goes_on or tensor.grad_fn is None:
            return self._goes_on
        waiting, seen = [tensor.grad_fn], {tensor.grad_fn}
        while waiting and len(seen) < _LOOKED_AT:
            node = waiting.pop()
            if self._first <= private.node_number(node) < self._last:
                return True
            for other, _ in node.next_functions:
                if other is not None and other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return False
