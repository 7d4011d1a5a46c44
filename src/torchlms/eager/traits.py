"""Traits: what an op is like, as far as running out of memory and running again are concerned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from torchlms.eager import private
from torchlms.eager.per_op import PerOp
from torchlms.eager.tensors import is_plain

if TYPE_CHECKING:
    from torchlms.eager.convolution import ConvolutionRoom
    from torchlms.memory.device import CpuDevice, CudaDevice


def makes_cpu_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what an op returns takes memory of the CPU, and not of the meta device or of nothing."""
    if private.faking():
        return False
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "cpu"
    first = _first_tensor((*args, *kwargs.values()))
    return first is None or (first.device.type == "cpu" and is_plain(first))


def _first_tensor(items: Iterable[Any]) -> torch.Tensor | None:
    for item in items:
        if isinstance(item, torch.Tensor):
            return item
        if isinstance(item, (list, tuple)):
            inner = _first_tensor(item)
            if inner is not None:
                return inner
    return None


def careful_ops(rooms: ConvolutionRoom) -> PerOp[bool]:
    """Whether an op needs more than an eye on running out of memory."""
    return PerOp(lambda func: rooms.concerns(func) or seeded(func) or writes_list(func))


def _is_seeded(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def _writes_list(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and any(
        argument.alias_info is not None and argument.alias_info.is_write and "[]" in str(argument.type)
        for argument in schema.arguments
    )


def _takes_generator(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and any(argument.name == "generator" for argument in schema.arguments)


# Whether it can be told which generator to draw from.
takes_generator = PerOp(_takes_generator)
# Whether an op draws random numbers from a generator.
seeded = PerOp(_is_seeded)
# Whether it writes a list of tensors, so that a failure may leave it half done.
writes_list = PerOp(_writes_list)
name_of: PerOp[str] = PerOp(str)  # which takes long


def generator_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device | None = None
) -> torch.Generator | None:
    """The generator that ``func`` draws from: the one it is given, or that of ``device``, which by
    default is where its tensors are. None if it draws nothing."""
    if not seeded(func):
        return None
    for given in (kwargs.get("generator"), *args):
        if isinstance(given, torch.Generator):
            return given
    if device is None:
        first = _first_tensor((*args, *kwargs.values()))
        device = first.device if first is not None else torch.device(kwargs.get("device") or "cpu")
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def rewind_of(device: CudaDevice | CpuDevice, func: Any, kwargs: dict[str, Any]) -> Callable[[], None] | None:
    """What gives a random op's generator back, if it is one on a device that can run out inside it."""
    generator = generator_of(func, (), kwargs, device.torch_device) if device.is_cuda else None
    if generator is None or generator.device.type != "cuda":
        return None
    offset = generator.get_offset()

    def rewind() -> None:
        generator.set_offset(offset)

    return rewind
