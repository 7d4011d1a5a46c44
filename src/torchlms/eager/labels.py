"""Labels: the name of the module whose forward is running, read off the stack.

[Note: No hooks for names] Module hooks would tell the same, but torch.compile traces them: it breaks
its graphs at ours, compiles again whenever they come or go, and after a few times gives up for good.
"""

from __future__ import annotations

import sys
from weakref import WeakKeyDictionary

import torch


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
        """The innermost module whose ``forward`` is on this thread's stack, "" if there is none."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "forward":
                module = frame.f_locals.get("self")
                if isinstance(module, torch.nn.Module):
                    return self._names.get(module, type(module).__name__)
            frame = frame.f_back  # type: ignore[assignment]
        return ""
