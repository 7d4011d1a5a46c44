"""OptimizerView: what LMS reads of an optimizer, where there is not exactly one torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

State = dict[Any, Any]  # what an optimizer keeps for one parameter, by name


class OptimizerView:
    """Parameters and states as they are whenever somebody looks; both may come and go."""

    def __init__(
        self,
        parameters: Callable[[], Iterable[torch.Tensor]],
        states: Callable[[], Iterable[State]],
    ) -> None:
        self._parameters = parameters
        self._states = states

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self._parameters())}]

    @property
    def state(self) -> dict[int, State]:
        return dict(enumerate(self._states()))
