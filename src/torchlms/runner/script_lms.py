"""Script LMS: an LMS whose models and optimizers come to light while the script runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchlms.api import LMS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from torchlms.runner.found import Models, Optimizers


class ScriptLMS(LMS):
    """``LMS(model, optimizer)`` for several of each, and for those that are met after it was entered.

    Where the script opens an LMS of its own, this one closes itself and calls ``gave_way``.
    """

    def __init__(
        self, models: Models, optimizers: Optimizers, *, gave_way: Callable[[], None], **options: Any
    ) -> None:
        super().__init__(models, optimizers, **options)  # type: ignore[arg-type]  # what LMS asks of one
        self._models = models
        self._gave_way = gave_way

    def take_in(self, model: torch.nn.Module, *, listen: bool) -> None:
        """Know ``model`` as if it had been there at the beginning; ``listen`` where forward passes begin."""
        self._models.add(model)
        self._kinds.label()
        self._labels.learn(self._models)
        if listen and self._aside is not None:
            self._aside.listen(model, self._undo)

    def _model_name(self) -> str:
        return ", ".join(type(model).__name__ for model in self._models.living())

    def _give_way(self) -> bool:
        self.__exit__(None, None, None)
        self._gave_way()
        return True
