"""Keras 3 on its torch backend: ``fit`` under LMS, by a callback."""

from __future__ import annotations

from typing import Any

from torchlms.errors import NotSupported
from torchlms.integrations.keeper import Keeper, running_call
from torchlms.integrations.keras_graph import forget_early
from torchlms.integrations.optimizer_view import OptimizerView

try:
    from keras import backend
    from keras.callbacks import Callback
except ImportError as error:
    if error.name not in (None, "keras"):  # Keras is there, and the library of its backend is not
        raise ModuleNotFoundError(
            f"Keras could not load its backend ({error}): set the environment variable "
            "KERAS_BACKEND=torch before keras is imported",
            name=error.name,
        ) from error
    raise ModuleNotFoundError(
        "torchlms.integrations.keras needs keras: pip install '.[keras]' in a clone of torchlms", name="keras"
    ) from error


class LMSCallback(Keeper, Callback):  # type: ignore[misc]
    """Keeps ``Model.fit`` within a device memory budget, without changing a bit of its results.

    >>> model.fit(..., callbacks=[LMSCallback(budget="16GiB")])   # doctest: +SKIP

    On from the first step to the last, validation in between included; off before and after, also
    when ``fit`` raises (see the note in ``keeper.py``). Nothing of it is saved with the model: give
    the callback again to ``fit`` after ``load_model``. At the end of each epoch the key figures are
    added to the logs, and so to the history and to callbacks that come later.
    """

    def __init__(self, *wrong: Any, **options: Any) -> None:
        super().__init__(*wrong, **options)
        if backend.backend() != "torch":
            raise NotSupported(
                f"Keras runs on its {backend.backend()} backend: set the environment variable "
                "KERAS_BACKEND=torch before keras is imported"
            )

    def on_train_begin(self, logs: Any = None) -> None:
        model: Any = self.model
        call = running_call("fit", lambda owner: owner is model)
        self._begin(model, _view(model.optimizer), call=call)
        self._guard(model, "train_function")
        if not model.jit_compile:
            forget_early(model, self._undo)

    def on_test_begin(self, logs: Any = None) -> None:
        self._guard(self.model, "test_function")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._step_ended()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs.update(self._figures())

    def on_train_end(self, logs: Any = None) -> None:
        self.close()


def _view(optimizer: Any) -> OptimizerView | None:
    """A Keras optimizer keeps its states in a list of variables; the parameters are the model's."""
    if optimizer is None:
        return None
    return OptimizerView(
        lambda: (),
        lambda: ({variable.path: variable.value for variable in optimizer.variables},),
    )
