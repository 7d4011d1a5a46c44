"""Keeper: holds one ``LMS`` for as long as a trainer trains.

[Note: When a trainer raises] Neither ``transformers.Trainer.train`` nor ``keras.Model.fit`` tells its
callbacks that it ends with an error. So two things see to it. Where the trainer calls a function of
its own for most of the work, that function is guarded: LMS is left at once when it raises. And a
token lies among the local variables of the call of ``train`` or ``fit``; when the call's frame goes,
the token goes, and LMS is left then. A frame goes at the end of the ``except`` clause that handles
the error, unless somebody keeps the error with its traceback, as notebooks do. For the few errors
that pass the guard there is ``close()``, the ``with`` form, and the next training, which leaves what
is left over.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from difflib import get_close_matches
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

from torchlms.api import LMS
from torchlms.integrations.figures import key_figures
from torchlms.outlet import check_folder
from torchlms.steps import StepLog

log = logging.getLogger("torchlms")

# What LMS can be asked for; model and optimizer are the trainer's.
OPTIONS = tuple(name for name in inspect.signature(LMS).parameters if name not in ("model", "optimizer"))

_TOKEN = "__torchlms__"  # no name that a program would use

_here = threading.local()
_Own = TypeVar("_Own", bound="Keeper")


class Keeper:
    """What all callbacks share: ``options`` are those of ``torchlms.LMS``, read at once.

    Each training gets an ``LMS`` of its own. ``lms`` is the current or the last one, so that its
    ``report()`` can be asked for afterwards. ``csv`` is the path of a file that gets a row for each
    step of the training (``torchlms.steps.StepLog``); each training writes it anew. In a ``with``
    statement a callback is sure to be off after it, whatever happens to errors.
    """

    def __init__(self, *wrong: Any, csv: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__()
        self._check(wrong, options)  # what is misspelt is found now and not hours later
        self.lms: LMS | None = None
        self._options = options
        self._csv = Path(csv) if csv is not None else None
        check_folder(self._csv)
        self._steps: StepLog | None = None
        self._on = False
        self._call: int | None = None  # which frame must be running, by identity; None: not known
        self._finaliser: weakref.finalize[Any, Any] | None = None
        self._undo = ExitStack()  # what else is to be undone when LMS is left

    def close(self) -> None:
        """Leave LMS, if it is on; does nothing otherwise."""
        if not self._on or self.lms is None:
            return
        self._on = False
        if getattr(_here, "keeper", None) is self:
            _here.keeper = None
        if self._finaliser is not None:
            self._finaliser.detach()
        with self._undo:
            self.lms.__exit__(None, None, None)

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, error, traceback
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in memory or in a file, has the options only."""
        return {
            **self.__dict__,
            "lms": None,
            "_on": False,
            "_call": None,
            "_finaliser": None,
            "_steps": None,
            "_undo": ExitStack(),
        }

    def _check(self, wrong: tuple[Any, ...], options: dict[str, Any]) -> None:
        name = type(self).__name__
        if wrong:
            raise TypeError(f"options are given by name, such as {name}(budget={wrong[0]!r})")
        known = ["csv", *OPTIONS]
        for option in options:
            if option not in known:
                close = get_close_matches(option, known, 1)
                meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
                raise TypeError(f"{name} has no option {option!r}; {meant}")
        LMS(**options)  # changes nothing

    # -- for the adapters --------------------------------------------------------------------

    def _begin(self, model: torch.nn.Module, optimizer: Any, *, call: FrameType | None = None) -> None:
        """Enter LMS; leave it at the latest when ``call``, the trainer's own function, is over."""
        left: Keeper | None = getattr(_here, "keeper", None)
        if left is not None and (left is self or left._is_over()):
            left.close()
        lms = LMS(model, optimizer, **self._options)
        self._steps = StepLog(lms, self._csv) if self._csv is not None else None
        lms.__enter__()
        self.lms, self._on, _here.keeper = lms, True, self
        if self._steps is not None:
            self._undo.callback(self._steps.close)
        _say_if_several()
        self._call, self._finaliser = None, None
        if call is not None:
            token = _Token()
            self._call, self._finaliser = id(call), weakref.finalize(token, self.close)
            self._finaliser.atexit = False  # too late for copies, and the store sees to its own files
            call.f_locals[_TOKEN] = token

    def _guard(self, owner: Any, name: str) -> None:
        """Leave LMS at once when ``owner.name(...)`` raises; undone with LMS."""
        inner = getattr(owner, name, None)
        if inner is None or isinstance(inner, _Guarded) or not self._on:
            return
        guarded = _Guarded(inner, self.close)
        self._undo.callback(_restore, vars(owner), name, guarded, vars(owner).get(name))
        vars(owner)[name] = guarded

    def _step_ended(self) -> None:
        """A step of the training has ended, for those who want a row of each."""
        if self._on and self._steps is not None:
            self._steps.step()

    def _is_over(self) -> bool:
        """Whether the call that began this is known to run no more. Its frame is alive: its id is its own."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and id(frame) != self._call:
            frame = frame.f_back
        return self._call is not None and frame is None

    def _unseen(self) -> AbstractContextManager[None]:
        """While the trainer does something that is no part of training."""
        return self.lms._unseen() if self._on and self.lms is not None else nullcontext()

    def _figures(self) -> dict[str, float]:
        """What to log now; empty if LMS is off."""
        return key_figures(self.lms) if self._on and self.lms is not None else {}


def _say_if_several() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        log.warning(
            "%d processes train together, each with an LMS of its own, which has not been tested: compare "
            "the first losses with those of a run without it",
            distributed.get_world_size(),
        )


class _Token:
    """Lives as long as the frame that it was put into."""

    __slots__ = ("__weakref__",)


class _Guarded:
    """A trainer's own function, and what to do when it raises."""

    def __init__(self, inner: Callable[..., Any], leave: Callable[[], None]) -> None:
        self._inner = inner
        self._leave = leave

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._inner(*args, **kwargs)
        except BaseException:
            self._leave()
            raise


def _restore(attributes: dict[str, Any], name: str, ours: Any, before: Any) -> None:
    """Put back what was there, unless somebody has put something else there since."""
    if attributes.get(name) is not ours:
        return
    if before is None:
        del attributes[name]
    else:
        attributes[name] = before


def running_call(name: str, of: Callable[[object], bool]) -> FrameType | None:
    """The innermost call on this thread's stack of a method ``name`` whose ``self`` passes ``of``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name and of(frame.f_locals.get("self")):
            return frame
        frame = frame.f_back
    return None
