"""Output: the lines of a run, in the manner of tf_cnn_benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchlms.bench.networks import Network, source
from torchlms.bench.options import BenchOptions, Way
from torchlms.bench.speed import speed, spread
from torchlms.memory.limits import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.bench.runner import Measurement

_RULE = "-" * 64


def device_name(device: torch.device) -> str:
    """``NVIDIA H200`` or ``2 CPU threads``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def header(network: Network, options: BenchOptions, limit_bytes: int | None) -> list[str]:
    """What is about to run; printed before anything is built."""
    budget = options.budget or "what the device has"
    if options.way is not Way.LMS:
        budget = "none (LMS is off)" if limit_bytes is None else f"cap of {format_bytes(limit_bytes)}"
    size = f"{options.image_size}" if network.data_format != "tokens" else f"{options.sequence} tokens"
    lines = {
        "Torch": torch.__version__,
        "Model": f"{network.name} ({source(network.name)})",
        "Dataset": "synthetic",
        "Mode": f"training, {options.dtype}",
        "Way": options.way.value,
        "Batch size": f"{options.batch_size}",
        "Sample size": size,
        "Num batches": f"{options.num_batches} after {options.warmup} of warm up",
        "Device": f"{options.device} ({device_name(torch.device(options.device))})",
        "Data format": network.data_format,
        "Optimizer": options.optimizer,
        "Budget": budget,
        "Flags": f"cudnn.benchmark {_on(options.cudnn_benchmark)}, "
        f"deterministic {_on(options.deterministic)}",
    }
    return [f"{name + ':':<13}{text}" for name, text in lines.items()] + ["=" * 10]


def column_line(unit: str) -> str:
    """The heading above the step lines."""
    return f"Step\t{'Img' if unit == 'images' else unit.capitalize()}/sec\ttotal_loss"


def step_line(number: int, items_per_step: int, step_s: Sequence[float], loss: float, unit: str) -> str:
    """``10<tab>images/sec: 2111.3 +/- 2.0 (jitter = 6.1)<tab>7.123``"""
    rate = speed(items_per_step, step_s)
    return (
        f"{number}\t{unit}/sec: {rate.mean:.1f} +/- {rate.uncertainty:.1f} (jitter = {rate.jitter:.1f})"
        f"\t{loss:.3f}"
    )


def footer(measurement: Measurement) -> list[str]:
    """The total between dashes, then memory; with LMS what was predicted beside what was measured."""
    unit = measurement.network.unit
    rate = speed(measurement.items_per_step, measurement.timed_s)
    seconds = spread(measurement.timed_s)
    peak = format_bytes(measurement.peak_device_bytes)
    reserved = measurement.peak_reserved_bytes
    lines = [
        _RULE,
        f"total {unit}/sec: {rate.mean:.2f}",
        _RULE,
        f"step: {seconds.median * 1e3:.1f} ms median, {seconds.min * 1e3:.1f} to {seconds.max * 1e3:.1f}",
        f"peak: {peak} allocated" + (f", {format_bytes(reserved)} reserved" if reserved else ""),
    ]
    stats = measurement.stats
    if stats:
        lines.append(
            f"moved per step: {format_bytes(stats.get('bytes_out_per_step') or 0)} out, "
            f"{format_bytes(stats.get('bytes_in_per_step') or 0)} in, "
            f"{format_bytes(stats.get('disk_bytes_per_step') or 0)} disk; "
            f"host peak {format_bytes(measurement.peak_host_bytes)}; "
            f"reclaims {stats.get('reclaims') or 0}; state {stats.get('state')}"
        )
    predicted = stats.get("predicted") or {}
    if predicted.get("step_s"):
        lines.append(
            f"predicted: peak {format_bytes(predicted.get('peak_device_bytes') or 0)}, "
            f"step {predicted['step_s'] * 1e3:.1f} ms; measured: peak {peak}, "
            f"step {seconds.median * 1e3:.1f} ms"
        )
    return lines


def _on(flag: bool) -> str:
    return "on" if flag else "off"
