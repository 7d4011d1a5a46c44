"""Labels: the name of the module whose forward is running, while a step is being recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from torchlms.eager.engine import Engine


class ModuleLabels:
    """Two global module hooks, there only while they are on."""

    def __init__(self, engine: Engine, model: torch.nn.Module | None) -> None:
        self._engine = engine
        self._names = {} if model is None else {module: name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._handles: list[Any] = []

    def on(self) -> None:
        if not self._handles:
            self._handles = [
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ]

    def off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        self._show("")

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        del args
        name = self._names.get(module)
        self._stack.append(type(module).__name__ if name is None else name)
        self._show(self._stack[-1])

    def _leave(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        del module, args, result
        if self._stack:
            self._stack.pop()
        self._show(self._stack[-1] if self._stack else "")

    def _show(self, name: str) -> None:
        self._engine.module = name
        if self._engine.recorder is not None:
            self._engine.recorder.module = name
