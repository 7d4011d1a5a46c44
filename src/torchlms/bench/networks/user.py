"""Anyone's own network, named as ``package.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import PurePath
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlms.bench.networks.blame import blamed
from torchlms.bench.networks.network import (
    IMAGE_CLASSES,
    Batch,
    MakeBatch,
    Network,
    NetworkOptions,
    image_batch,
)
from torchlms.errors import BadOption

_MORE = "torchlms --debug shows all of it"


def load_user_network(spec: str) -> Network:
    """The network that ``package.module:factory`` names.

    ``factory()`` returns a module that takes images and gives class scores, or ``(module, make_batch)``
    with ``make_batch(options, device, generator) -> (inputs, target)`` for anything else.
    """
    module_name, _, attribute = spec.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        path = PurePath(module_name)
        there = "" if path.parent in (PurePath(), PurePath(".")) else f", in {path.parent}"
        raise BadOption(f"--model {spec}: a module is named as by import: {path.stem}:{attribute}{there}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` would; a console script does not
    factory = _find_factory(spec, module_name, attribute)

    def make(options: NetworkOptions) -> tuple[nn.Module, MakeBatch]:
        module, make_batch = _made_by(spec, factory)
        if make_batch is None:
            return module, image_batch(classes=_classes(module))
        return module, _checked(spec, make_batch)

    return Network(
        name=spec,
        description="your own",
        factory=make,
        make_batch=_no_batch,
        loss=any_loss,
        default_batch_size=16,
        default_image_size=224,
        unit="samples",
        data_format="as made",
        users_own=True,
    )


def _find_factory(spec: str, module_name: str, attribute: str) -> Callable[[], Any]:
    module = _imported(spec, module_name)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        alike = difflib.get_close_matches(attribute, dir(module), n=1)
        meant = f"; did you mean {module_name}:{alike[0]}?" if alike else ""
        raise BadOption(f"--model {spec}: {module_name} has no callable {attribute!r}{meant}")
    return found  # type: ignore[no-any-return]


def _imported(spec: str, module_name: str) -> ModuleType:
    try:
        failed = f"--model {spec}: {module_name} failed as it was imported"
        with blamed(lambda error: f"{failed}: {error}; {_MORE}"):
            try:
                return importlib.import_module(module_name)
            except ImportError as error:
                raise BadOption(f"--model {spec}: cannot import {module_name}: {error}") from error
    except SystemExit as error:
        raise BadOption(
            f"--model {spec}: {module_name} ends the program as it is imported (SystemExit: {error}): put "
            'what a script does under `if __name__ == "__main__":`'
        ) from error


def _made_by(spec: str, factory: Callable[[], Any]) -> tuple[nn.Module, MakeBatch | None]:
    """What the factory gives, if that is what it should: its own errors are its author's to see."""
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise BadOption(
            f"--model {spec}: the factory is called without arguments, and that does not suit it ({error}): "
            "name a function that needs none and calls it"
        ) from error
    except ValueError:  # some callables of C have no signature
        pass
    with blamed(lambda error: f"--model {spec}: the factory failed: {error}; {_MORE}"):
        made = factory()
    pair = made if isinstance(made, tuple) else (made, None)
    if len(pair) != 2 or not isinstance(pair[0], nn.Module) or not (pair[1] is None or callable(pair[1])):
        kinds = [type(item).__name__ for item in pair]
        gave = f"({', '.join(kinds)})" if isinstance(made, tuple) else kinds[0]
        raise BadOption(
            f"--model {spec}: the factory gave {gave}; it gives a "
            "torch.nn.Module that takes images, or (module, make_batch) with "
            "make_batch(options, device, generator) -> (inputs, target)"
        )
    if not any(parameter.requires_grad for parameter in pair[0].parameters()):
        raise BadOption(f"--model {spec}: the {type(pair[0]).__name__} has no parameters to train")
    return pair


def _checked(spec: str, make_batch: MakeBatch) -> MakeBatch:
    """``make_batch``, with what goes wrong in it, or comes out of it, said in a line."""

    def make(options: NetworkOptions, device: torch.device, generator: torch.Generator) -> Batch:
        failed = f"--model {spec}: make_batch(options, device, generator) failed"
        with blamed(lambda error: f"{failed}: {error}; {_MORE}"):
            made = make_batch(options, device, generator)
        if not isinstance(made, (tuple, list)) or len(made) != 2:
            raise BadOption(
                f"--model {spec}: make_batch gave {type(made).__name__}; it gives a pair (inputs, target)"
            )
        return made[0], made[1]

    return make


def any_loss(output: Any, target: Any) -> Tensor:
    """The output's own loss where it has one, else cross entropy for integer targets, else mean square."""
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    logits: Tensor = output if isinstance(output, Tensor) else getattr(output, "logits", output)
    if logits.dim() == 0:
        return logits
    if isinstance(target, Tensor) and not target.is_floating_point():
        if target.shape == (logits.shape[0], *logits.shape[2:]):  # classes in dimension 1, as PyTorch has it
            return F.cross_entropy(logits.float(), target)
        rows = logits.flatten(0, -2)
        if rows.shape[0] != target.numel():
            raise BadOption(
                f"the network gives {list(logits.shape)} for integer targets of shape {list(target.shape)}: "
                "classes must be its dimension 1 or its last one. Or have it return its own loss, as "
                "a scalar or as .loss"
            )
        return F.cross_entropy(rows.float(), target.flatten())
    return F.mse_loss(logits, target)


def _classes(module: nn.Module) -> int:
    """What the last linear layer gives out, so that labels are in range."""
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return linear[-1].out_features if linear else IMAGE_CLASSES


def _no_batch(options: NetworkOptions, device: torch.device, generator: torch.Generator) -> Batch:
    raise AssertionError("a user's factory always comes with a batch maker")
