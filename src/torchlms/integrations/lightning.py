"""Lightning: ``lightning.Trainer`` under LMS by a callback, and a Fabric loop by a ``with`` statement."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torchlms.api import LMS
from torchlms.integrations.figures import key_figures
from torchlms.integrations.keeper import Keeper
from torchlms.integrations.optimizer_view import OptimizerView

try:
    from lightning.fabric import Fabric, is_wrapped
    from lightning.pytorch import Callback
except ImportError as error:
    raise ModuleNotFoundError(
        "torchlms.integrations.lightning needs lightning: pip install '.[lightning]' in a clone of torchlms",
        name="lightning",
    ) from error


class LMSCallback(Keeper, Callback):  # type: ignore[misc]
    """Keeps ``Trainer.fit`` within a device memory budget, without changing a bit of its results.

    >>> trainer = Trainer(..., callbacks=[LMSCallback(budget="16GiB")])   # doctest: +SKIP

    On from the first training step to the last, validation in between included; off before and
    after, also when ``fit`` raises. At the end of each epoch the key figures are logged.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module, _one_optimizer(trainer.optimizers))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step_ended()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with self._unseen():
            self.log_dict(self._figures())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.close()


class FabricLMS(LMS):
    """``torchlms.LMS`` for what ``fabric.setup`` returned; logs the key figures when the loop is over.
    ``optimizer`` is one, or a list of several.

    >>> model, optimizer = fabric.setup(model, optimizer)                 # doctest: +SKIP
    >>> with FabricLMS(fabric, model, optimizer, budget="16GiB") as lms:  # doctest: +SKIP
    ...     ...  # an unmodified training loop
    """

    def __init__(self, fabric: Any, model: Any, optimizer: Any = None, **options: Any) -> None:
        if not isinstance(fabric, Fabric):
            raise TypeError(f"the fabric comes first: FabricLMS(fabric, model, optimizer), not {fabric!r}")
        optimizers = [optimizer] if not isinstance(optimizer, (list, tuple)) else list(optimizer)
        super().__init__(
            model.module if is_wrapped(model) else model,
            _one_optimizer(
                [each.optimizer if is_wrapped(each) else each for each in optimizers if each is not None]
            ),
            **options,
        )
        self._fabric = fabric

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        figures = key_figures(self)
        super().__exit__(kind, error, traceback)
        if kind is None:
            self._fabric.log_dict(figures)


def _one_optimizer(optimizers: list[Any]) -> Any:
    """As LMS wants it: one, or one view of several."""
    if len(optimizers) < 2:
        return optimizers[0] if optimizers else None
    return OptimizerView(
        lambda: (item for one in optimizers for group in one.param_groups for item in group["params"]),
        lambda: (state for one in optimizers for state in one.state.values()),
    )
