"""Ways: what is done to a workload so that it needs less memory; LMS is one, its rivals the others."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch.autograd.graph import save_on_cpu

from torchlms.bench.blocks import checkpoint_blocks
from torchlms.bench.options import BenchOptions, Way
from torchlms.errors import BadOption, NotSupported
from torchlms.memory.limits import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchlms.bench.workload import Workload


class LMSHandle(Protocol):
    """What the benchmark asks of a running LMS."""

    def stats(self) -> dict[str, Any]: ...

    def report(self) -> str: ...


def apply_way(workload: Workload, way: Way) -> None:
    """Change the workload as the rival wants it. LMS and the plain ways leave it alone."""
    pin = workload.device.type == "cuda"
    offload = partial(save_on_cpu, pin_memory=pin)
    if way is Way.SAVE_ON_CPU:
        workload.around_forward = offload
    elif way is Way.CHECKPOINT:
        checkpoint_blocks(workload.model)
    elif way is Way.CHECKPOINT_OFFLOAD:
        checkpoint_blocks(workload.model, offload)


def open_lms(workload: Workload, options: BenchOptions) -> contextlib.AbstractContextManager[LMSHandle]:
    """The context that a user would write."""
    import torchlms  # here, so that the plain ways time a process without it

    return cast(
        "contextlib.AbstractContextManager[LMSHandle]",
        torchlms.LMS(  # type: ignore[attr-defined,unused-ignore]
            workload.model,
            workload.optimizer,
            budget=options.budget,
            host_budget=options.host_budget,
            disk_dir=options.disk_dir,
            disk_budget=options.disk_budget,
            plan=options.plan,
            rules=options.rules(),
            verify=options.verify_every or options.verify,
            snapshot=options.snapshot,
        ),
    )


def cap_bytes(options: BenchOptions, device: torch.device) -> int | None:
    """The allocator's cap for a run without LMS, None for none."""
    text = options.cap
    if options.way is Way.NONE_CAPPED and text in (None, "none"):
        text = options.budget
        if text is None:
            raise BadOption("--way none_capped needs --budget or --cap")
    if options.way is Way.LMS or text is None or text == "none":
        return None
    if device.type != "cuda":
        raise NotSupported(f"a cap of {text} needs the CUDA allocator; {device.type} has none")
    return parse_bytes(text, whole_bytes=torch.cuda.get_device_properties(device).total_memory)


@contextlib.contextmanager
def capped(device: torch.device, limit_bytes: int | None) -> Iterator[None]:
    """Hold the CUDA allocator to ``limit_bytes``; lifted afterwards."""
    if limit_bytes is None:
        yield
        return
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_bytes), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
