"""Labels: the name of the module whose forward is running, read off the stack.

[Note: No hooks for names] Module hooks would tell the same, but torch.compile traces them: it breaks
its graphs at ours, compiles again whenever they come or go, and after a few times gives up for good.
"""

from __future__ import annotations

import sys
from types import FrameType
from weakref import WeakKeyDictionary

import torch

from torchlms.eager import private


class ModuleLabels:
    """Knows the modules of one model by name; any other goes by its type."""

    def __init__(self, model: torch.nn.Module | None) -> None:
        self._names: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
        if model is not None:
            self.learn(model)

    def learn(self, model: torch.nn.Module) -> None:
        """The names in ``model``; it is not kept alive for them."""
        self._names.update({module: name for name, module in model.named_modules()})

    def here(self) -> str:
        """The innermost module whose forward pass is on this thread's stack, "" if there is none."""
        frame = sys._getframe(1)
        while frame is not None:
            module = module_of(frame)
            if module is not None:
                return self._names.get(module, type(module).__name__)
            frame = frame.f_back  # type: ignore[assignment]
        return ""


def module_of(frame: FrameType) -> torch.nn.Module | None:
    """The module whose forward pass ``frame`` is: its ``forward``, be it called directly, or torch's own
    function around that, whatever the module's author calls ``forward`` and its arguments."""
    if frame.f_code is not _CALL and frame.f_code.co_name != "forward":
        return None
    module = frame.f_locals.get("self")
    return module if isinstance(module, torch.nn.Module) else None


_CALL = private.module_call()
