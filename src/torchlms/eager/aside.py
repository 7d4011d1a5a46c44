"""Aside: where everything fits LMS leaves the loop alone, and comes back when that no longer holds."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from torchlms.eager.engine import Engine
    from torchlms.eager.install import Installation

log = logging.getLogger("torchlms")

_GREW = 1.02  # inputs this much larger than any seen end the standing aside


class Aside:
    """Whether LMS stands aside, on a card: no hook and no mode is on then but one hook on each model
    listened to.

    Forward passes of these are the places between ops from which to step aside, or to come back.
    """

    def __init__(self, engine: Engine, installation: Installation) -> None:
        self.on = False
        self._engine = engine
        self._installation = installation
        self._largest_input_bytes: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()

    def listen(self, model: torch.nn.Module, undo: ExitStack) -> None:
        """Hook into the forward passes of ``model``; ``undo`` gets the opposite."""
        hook = ForwardHook(self._before_forward)
        undo.callback(model.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def end(self) -> None:
        """Be on again; nothing where LMS did not stand aside."""
        if self.on:
            self.on = False
            self._installation.put_on()

    def _before_forward(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        engine, installation = self._engine, self._installation
        if engine.dead:
            return
        input_bytes = _bytes_in(args, kwargs)
        # One of several models that so far was called for its results alone saves nothing now either.
        unseen_bytes = 0 if torch.is_grad_enabled() else input_bytes
        largest_bytes = self._largest_input_bytes.get(module, unseen_bytes)
        if not installation.on:
            if torch.is_inference_mode_enabled():
                return  # which saves nothing, and takes a mode that is put on inside it away with it
            engine.collector.look_now()
            self._perhaps_come_back(grew=input_bytes > _GREW * largest_bytes)
        elif torch.is_grad_enabled():
            self._largest_input_bytes[module] = max(largest_bytes, input_bytes)
            engine.settle()
            # Inputs whose size cannot be seen could grow unnoticed.
            if input_bytes and self._may_begin() and installation.on_top():
                engine.leave_alone()
                installation.take_off()
                self.on = True

    def _may_begin(self) -> bool:
        engine = self._engine
        return engine.routines.all_fit() and not engine.starved_aside and not engine.outgrown()

    def _perhaps_come_back(self, *, grew: bool) -> None:
        engine = self._engine
        if not grew and not engine.failed_alone() and not engine.outgrown():
            return
        log.info("%s: LMS is back", "larger inputs than before" if grew else "memory has become tight")
        self.on = False
        if not grew:
            engine.routines.doubt()
        self._installation.put_on()


class ForwardHook:
    """Tells of a forward pass. A copy of the model, in memory or in a file, gets one that is deaf."""

    def __init__(self, tell: Callable[[torch.nn.Module, Any, Any], None] | None = None) -> None:
        self._tell = tell

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._tell is not None:
            self._tell(module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """As something of the standard library that does nothing: files are read without this package."""
        return getattr, (contextlib.nullcontext(), "__exit__")


def _bytes_in(*items: Any) -> int:
    total = 0
    for item in items:
        if isinstance(item, torch.Tensor):
            total += item.nbytes
        elif isinstance(item, (list, tuple)):
            total += _bytes_in(*item)
        elif isinstance(item, dict):
            total += _bytes_in(*item.values())
    return total
