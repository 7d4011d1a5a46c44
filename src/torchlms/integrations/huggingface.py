"""Hugging Face: ``transformers.Trainer`` under LMS, by a callback."""

from __future__ import annotations

import weakref
from typing import Any

from torchlms.errors import NotSupported
from torchlms.integrations.keeper import Keeper, running_call

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ModuleNotFoundError(
        "torchlms.integrations.huggingface needs transformers and accelerate: "
        "pip install '.[huggingface]' in a clone of torchlms",
        name="transformers",
    ) from error


class LMSCallback(Keeper, TrainerCallback):  # type: ignore[misc]
    """Keeps ``Trainer.train`` within a device memory budget, without changing a bit of its results.

    >>> trainer = Trainer(..., callbacks=[LMSCallback(budget="16GiB")])   # doctest: +SKIP

    On from the first step to the last, evaluation and checkpoints in between included; off before
    and after, also when ``train`` raises (see the note in ``keeper.py``). At the end of each epoch
    the key figures go through ``Trainer.log``.
    """

    def __init__(self, *wrong: Any, **options: Any) -> None:
        super().__init__(*wrong, **options)
        self._trainer: weakref.ref[Any] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        if args.n_gpu > 1:
            raise NotSupported(
                f"Trainer sees {args.n_gpu} GPUs and would spread batches over them (DataParallel), but LMS "
                "handles one device a process: set CUDA_VISIBLE_DEVICES to one of them"
            )
        call = running_call("train", lambda owner: isinstance(owner, Trainer))
        self._begin(model, optimizer, call=call)
        if call is not None:
            trainer = call.f_locals["self"]
            self._trainer = weakref.ref(trainer)
            self._guard(trainer, "_run_epoch")  # of transformers 5; without it there is the call's frame

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._step_ended()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        trainer = self._trainer() if self._trainer is not None else None
        figures = self._figures()
        if trainer is None or not figures:
            return
        asked = control.should_log  # logging ours would count as having logged the loss
        trainer.log(figures)
        control.should_log = asked

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_trainer": None}
