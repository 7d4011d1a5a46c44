"""Install: the dispatch mode and the saved-tensor hooks of one thread, put on and taken off as a pair."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchlms.eager import private
from torchlms.eager.engine import Engine
from torchlms.eager.saver import Saver
from torchlms.errors import NotSupported


class WatchMode(TorchDispatchMode):
    """Shows every op of this thread, and of the backward passes it starts, to the engine.

    [Note: Compiled regions] Without these two declarations torch.compile sees a foreign mode and
    falls back to eager for good. With them a compiled region runs as one opaque piece.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from wrapping ``__torch_dispatch__``: we hide from torch.compile ourselves, but
        only where it looks. The wrapper costs as much per op as all the rest."""
        return False

    def __init__(self, engine: Engine) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = engine.watcher.run
        self._hidden: Any = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if private.compile_callback() is None:
            return self._run(func, args, kwargs if kwargs is not None else {})
        if self._hidden is None:
            self._hidden = torch.compiler.disable(self._run)
        return self._hidden(func, args, kwargs if kwargs is not None else {})


private.hide_from_compiler(WatchMode.__torch_dispatch__, Saver.pack, Saver.unpack)


class Installation:
    """On or off. ``take_off`` refuses to pop what somebody else pushed after us."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._saver = engine.saver
        self._mode: WatchMode | None = None
        self._hooks: Any = None
        self._thread = 0
        self._in_inference = False
        _ALL.add(self)

    @property
    def on(self) -> bool:
        return self._mode is not None

    def put_on(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._saver.pack, self._saver.unpack)
        self._hooks.__enter__()
        self._mode = WatchMode(self._engine)
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        self._thread = threading.get_ident()
        self._in_inference = torch.is_inference_mode_enabled()

    def on_top(self) -> bool:
        """Whether both can be popped now, in this thread, without touching anybody else's. Not in an
        inference mode entered after us: at its end it brings back the dispatch keys that it found, and torch
        then asks for a mode that is gone."""
        if self._mode is None or self._thread != threading.get_ident():
            return False
        if torch.is_inference_mode_enabled() and not self._in_inference:
            return False
        hooks = private.top_saved_tensor_hooks()
        ours = hooks is None or hooks[0] == self._saver.pack
        return ours and private.top_dispatch_mode() is self._mode

    def take_off(self) -> None:
        """Pop mode and hooks; NotSupported, and nothing popped, if they are not the innermost."""
        if self._mode is None:
            return
        if not self.on_top():
            raise NotSupported(
                "LMS was closed while a dispatch mode, an inference mode or saved-tensor hooks entered after "
                "it were open, or from another thread: close contexts in the opposite order of opening them. "
                "LMS is switched off, but its hooks stay in place, doing nothing, until this thread ends"
            )
        mode, hooks, self._mode, self._hooks = self._mode, self._hooks, None, None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        hooks.__exit__(None, None, None)


_ALL: weakref.WeakSet[Installation] = weakref.WeakSet()


def _take_off_in_child() -> None:
    """A forked worker has nothing to do with LMS, and need not have its ops pass through Python."""
    for installation in list(_ALL):
        if installation.on_top():
            installation.take_off()


os.register_at_fork(after_in_child=_take_off_in_child)
