"""Finder: sees the models and optimizers of a script as it trains, and puts LMS on at the first forward pass.

[Note: Looking only for a while] A hook on every module costs time in each of them, and torch.compile warns
of it and compiles again when it goes. So it stays for one round of the training loop, until a model that is
known comes by again and an optimizer has stepped in between. An optimizer that is new begins another round.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
import weakref
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchlms.api import current
from torchlms.eager import private
from torchlms.eager.labels import module_of
from torchlms.errors import LMSError
from torchlms.runner.found import Models, Optimizers
from torchlms.runner.script_lms import ScriptLMS

log = logging.getLogger("torchlms")

_LONGEST_LOOK = 64  # calls of known models, where optimizers that torch does not know take the steps
_COMPILE_WARNS = "Using `torch.compile.module.` when there are global hooks"


class Finder:
    """``options`` are keywords of ``LMS``; ``device`` is the one to watch, None: that of the first model."""

    def __init__(self, options: dict[str, Any], device: str | None) -> None:
        self.lms: ScriptLMS | None = None
        self.left = False  # for the script uses torchlms itself, or LMS could not be put on
        self._options = options
        self._device = None if device is None else torch.device(device)
        self._models = Models()
        self.optimizers = Optimizers()
        self._known: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # their submodules, too
        self._process = os.getpid()
        self._step_hooks = (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        )
        self._forward_hook: Any = None
        self._look()

    def stats(self) -> dict[str, Any]:
        """As ``LMS.stats``, also before LMS is on."""
        return self.lms.stats() if self.lms is not None else {"state": "off"}

    def end(self) -> None:
        """Take off every hook, and LMS; to be called where the script's main module has ended."""
        self._let_go()
        if self.lms is not None:
            self.lms.__exit__(None, None, None)

    # -- looking -----------------------------------------------------------------------------

    def _look(self) -> None:
        self._stepped, self._met_again = False, 0
        if self._forward_hook is None:
            warnings.filterwarnings("ignore", _COMPILE_WARNS, UserWarning)
            self._filter = warnings.filters[0]
            self._forward_hook = register_module_forward_pre_hook(self._before_forward)

    def _look_no_more(self) -> None:
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None
            if self._filter in warnings.filters:
                warnings.filters.remove(self._filter)  # type: ignore[attr-defined]

    def _let_go(self) -> None:
        self._look_no_more()
        for hook in self._step_hooks:
            hook.remove()

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        del args
        if torch.compiler.is_compiling() or not self._is_ours():
            return
        if module in self._known:
            self._met_again += any(module is model for model in self._models.living())
            if self._met_again and (self._stepped or self._met_again > _LONGEST_LOOK):
                self._look_no_more()
        elif self.lms is not None:
            self._meet(self.lms, module)
        elif torch.is_grad_enabled() and self._may_start((model := _outermost(module)).parameters()):
            self._models.add(model)
            self._start()
            self._meet(self.lms, model)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or not self._is_ours():
            return
        self._stepped = True
        if self.optimizers.add(optimizer):
            parameters = [item for group in self.optimizers.param_groups for item in group["params"]]
            if self.lms is None and self._may_start(parameters):
                self._start(device=parameters[0].device)  # no model: a step of functions, or all compiled
            elif self.lms is not None and self._forward_hook is None:
                self._look()
        self.optimizers.begin(optimizer, args, kwargs)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling() and self._is_ours():
            self.optimizers.end(optimizer, args, kwargs)

    def _is_ours(self) -> bool:
        """Whether this is the process and the thread that we run, and the script leaves LMS to us."""
        if os.getpid() != self._process or threading.current_thread() is not threading.main_thread():
            return False
        if current() is self.lms:
            return True
        self._leave_to_script()
        return False

    # -- starting ----------------------------------------------------------------------------

    def _may_start(self, parameters: Any) -> bool:
        """Whether something here is trained, on our device, and no mode is open that would close on ours."""
        parameters = list(parameters)
        if any(is_lazy(item) for item in parameters):
            return False
        device = next((item.device for item in parameters if item.requires_grad), None)
        if device is None or not self._is_our_device(device):
            return False
        return (
            private.top_dispatch_mode() is None
            and private.top_saved_tensor_hooks() is None
            and private.functorch_interpreter() is None
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        )

    def _is_our_device(self, device: torch.device) -> bool:
        asked = self._device
        return asked is None or (asked.type == device.type and asked.index in (None, device.index))

    def _start(self, device: torch.device | None = None) -> None:
        try:
            lms = ScriptLMS(
                self._models,
                self.optimizers,
                gave_way=self._leave_to_script,
                device=device,
                **self._options,
            )
            lms.__enter__()
        except LMSError as error:
            self._let_go()
            self.left = True
            log.error("%s", error)
            raise SystemExit(2) from error
        self.lms = lms

    def _meet(self, lms: ScriptLMS | None, module: torch.nn.Module) -> None:
        """Take in the model that ``module`` is, or belongs to."""
        model = _outermost(module)
        nested = model in self._known
        model = module if nested else model
        if lms is not None and not any(is_lazy(item) for item in model.parameters()):
            lms.take_in(model, listen=not nested)
            self._known.update(model.modules())

    def _leave_to_script(self) -> None:
        self._let_go()
        self.left = True
        log.warning("the script uses torchlms itself: its settings hold, those of `torchlms run` do not")


def _outermost(module: torch.nn.Module) -> torch.nn.Module:
    """The module whose forward pass stands lowest on the stack, else ``module``, whose own is to begin."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = module_of(frame)
        module = caller if caller is not None else module
        frame = frame.f_back  # type: ignore[assignment]
    return module
