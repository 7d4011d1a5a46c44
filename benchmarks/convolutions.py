"""Convolutions: each one of a network, by itself, before and after steps under LMS.

A convolution that cuDNN met without room for its workspace keeps a slow algorithm with other bits
for the life of the process (docs/design.md). So the same convolutions are run in a process that has
done nothing else ("before"), and in one in which LMS has trained under the cap ("after"). A third
process starves one of them on purpose, which shows that this would be seen.
"""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import measure_lms, resolved, tidy

from torchlms.bench.networks import get_network
from torchlms.memory.device import open_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from rows import Row

    from torchlms.bench.options import BenchOptions

    Emit = Callable[[dict[str, Any]], None]

_WARMUP, _REPEATS = 2, 9
_BALLAST_BYTES, _BALLAST_FILLS = 1 << 30, 16  # work that keeps the device busy until it is well fed
_CHUNK = 1024
_SPARE_BYTES = 32 << 20  # beside the results, when a convolution is starved on purpose


@dataclass(frozen=True, slots=True)
class Convolution:
    """What cuDNN's choice depends on."""

    inputs: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    input_gradient: bool

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.inputs))} by {'x'.join(map(str, self.weight))} /{self.stride[0]}"


def convolutions_of(options: BenchOptions) -> list[Convolution]:
    """The distinct convolutions of one step, seen on the meta device: no memory, no cuDNN."""
    network = get_network(options.model)
    sizes = options.network_options()
    model, _ = network.build(sizes, torch.device("meta"))
    found: dict[Convolution, None] = {}

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del output
        assert isinstance(module, nn.Conv2d)
        assert isinstance(module.padding, tuple)
        one = Convolution(
            inputs=tuple(args[0].shape),
            weight=tuple(module.weight.shape),
            stride=tuple(module.stride),
            padding=tuple(module.padding),
            dilation=tuple(module.dilation),
            groups=module.groups,
            input_gradient=bool(args[0].requires_grad),
        )
        found.setdefault(one)

    modules = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in modules:
        module.register_forward_hook(see)
    size = (options.batch_size, modules[0].in_channels, options.image_size, options.image_size)
    model(torch.empty(size, device="meta"))
    return list(found)


class Bench:
    """One convolution with fixed operands on a device."""

    def __init__(self, convolution: Convolution, index: int, device: torch.device) -> None:
        self.of = convolution
        self.device = device
        generator = torch.Generator(device).manual_seed(1000 + index)

        def random(size: tuple[int, ...]) -> Tensor:
            return torch.randn(size, device=device, generator=generator)

        self.x = random(convolution.inputs).requires_grad_(convolution.input_gradient)
        self.weight = random(convolution.weight).mul_(0.05).requires_grad_()
        with torch.device("meta"):
            made = self._forward(torch.empty(convolution.inputs), torch.empty(convolution.weight))
        self.gradient = random(tuple(made.shape))

    def _forward(self, x: Tensor, weight: Tensor) -> Tensor:
        of = self.of
        return F.conv2d(x, weight, None, of.stride, of.padding, of.dilation, of.groups)

    def forward(self) -> Tensor:
        return self._forward(self.x, self.weight)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        inputs = [self.x, self.weight] if self.of.input_gradient else [self.weight]
        return torch.autograd.grad(output, inputs, self.gradient)

    def bits(self) -> dict[str, str]:
        """Checksums of the output and of the gradients."""
        output = self.forward()
        gradients = self.backward(output)
        names = ("output", *(("input_gradient",) if self.of.input_gradient else ()), "weight_gradient")
        return dict(zip(names, map(checksum, (output, *gradients)), strict=True))

    def seconds(self) -> tuple[float, float]:
        """Median seconds forward and backward, timed on the device while the host runs ahead."""
        device = open_device(self.device)
        if device.is_cuda:
            ballast = torch.empty(_BALLAST_BYTES, dtype=torch.uint8, device=self.device)
            for _ in range(_BALLAST_FILLS):
                ballast.zero_()
        marks: list[tuple[Any, Any, Any]] = []
        for _ in range(_WARMUP + _REPEATS):
            start = device.mark()
            output = self.forward()
            between = device.mark()
            self.backward(output)
            marks.append((start, between, device.mark()))
            del output
        device.synchronize()
        timed = marks[_WARMUP:]
        return (
            statistics.median(between.since_s(start) for start, between, _ in timed),
            statistics.median(end.since_s(between) for _, between, end in timed),
        )


def checksum(tensor: Tensor) -> str:
    """Of the exact bits: integer sums of chunks of them, which come out the same in any order."""
    bits = tensor.detach().contiguous().view(torch.int32).flatten()
    whole = bits.numel() // _CHUNK * _CHUNK
    sums = [bits[:whole].view(-1, _CHUNK).sum(1, dtype=torch.int64), bits[whole:].to(torch.int64)]
    return hashlib.sha256(torch.cat(sums).cpu().numpy().tobytes()).hexdigest()[:16]


def examine(options: BenchOptions) -> list[dict[str, Any]]:
    """Speed and bits of every convolution. Bits that differ between two calls are left out."""
    device = options.torch_device()
    found = []
    for index, convolution in enumerate(convolutions_of(options)):
        tidy()
        bench = Bench(convolution, index, device)
        first, second = bench.bits(), bench.bits()
        forward_s, backward_s = bench.seconds()
        found.append(
            {
                "convolution": str(convolution),
                "forward_s": forward_s,
                "backward_s": backward_s,
                "bits": {name: bits for name, bits in first.items() if second[name] == bits},
                "not_repeatable": [name for name, bits in first.items() if second[name] != bits],
            }
        )
        del bench
    tidy()
    return found


def measure_before(row: Row, emit: Emit) -> None:
    """In a process that does nothing else, uncapped."""
    options = resolved(row)
    emit(
        {
            "way": "before",
            "lms": False,
            "batches": {str(batch): examine(replace(options, batch_size=batch)) for batch in row.batches},
        }
    )


def measure_after(row: Row, batch: int, emit: Emit) -> None:
    """Steps under LMS in a fresh process, then the same convolutions with the cap lifted."""
    options = replace(resolved(row), batch_size=batch)
    entry = measure_lms(options, row.warmup, row.steps)
    emit({**entry, "way": f"lms-{batch}", "convolutions": examine(options)})


def measure_starved(row: Row, emit: Emit) -> None:
    """The same instruments on a convolution that is starved on purpose: a 3x3 of the first stage."""
    options = replace(resolved(row), batch_size=row.batches[0])
    device = options.torch_device()
    convolutions = convolutions_of(options)
    square = [c for c in convolutions if c.weight[-1] > 1 and c.stride[0] == 1 and c.input_gradient]
    chosen = square[0]
    tidy()
    bench = Bench(chosen, convolutions.index(chosen), device)
    failed = ""
    try:
        with _room_for(device, bench.gradient.nbytes):
            output = bench.forward()
        with _room_for(device, bench.x.nbytes + bench.weight.nbytes):
            bench.backward(output)
        del output
    except RuntimeError as error:
        failed = str(error).splitlines()[0]
    tidy()
    forward_s, backward_s = bench.seconds()
    emit(
        {
            "way": "starved",
            "lms": False,
            "convolution": str(chosen),
            "forward_s": forward_s,
            "backward_s": backward_s,
            "bits": bench.bits(),
            **({"failed": failed} if failed else {}),
        }
    )


class _room_for:  # noqa: N801  (a context manager)
    """Hold the allocator to what it has and ``size_bytes``, with little to spare; no effect on the CPU."""

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        self.device = device
        self.size_bytes = size_bytes

    def __enter__(self) -> None:
        if self.device.type != "cuda":
            return
        torch.cuda.empty_cache()
        total_bytes = torch.cuda.get_device_properties(self.device).total_memory
        limit_bytes = torch.cuda.memory_reserved(self.device) + self.size_bytes + _SPARE_BYTES
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes, self.device)

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Slowdown of the worst, of all together, and the bits that differ."""
    old = {entry["convolution"]: entry for entry in before}
    slowdowns, differ, compared = {}, [], 0
    for entry in after:
        was = old[entry["convolution"]]
        for part in ("forward_s", "backward_s"):
            slowdowns[f"{entry['convolution']} {part[:-2]}"] = entry[part] / was[part]
        for name, bits in entry["bits"].items():
            if name in was["bits"]:
                compared += 1
                if was["bits"][name] != bits:
                    differ.append(f"{entry['convolution']} {name}")
    worst = max(slowdowns, key=slowdowns.__getitem__)
    total_s = [sum(entry["forward_s"] + entry["backward_s"] for entry in part) for part in (before, after)]
    return {
        "convolutions": len(after),
        "max_slowdown": slowdowns[worst],
        "slowest": worst,
        "total_slowdown": total_s[1] / total_s[0],
        "bits_compared": compared,
        "bits_differ": differ,
    }
