"""Result: a measurement as the JSON and CSV that are committed and compared."""

from __future__ import annotations

import csv
import resource
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from torchlms.bench import provenance
from torchlms.bench.networks import source
from torchlms.bench.options import BenchOptions, Way
from torchlms.bench.output import device_name
from torchlms.bench.speed import speed, spread

if TYPE_CHECKING:
    from pathlib import Path

    from torchlms.bench.runner import Measurement

SCHEMA = "torchlms.bench/1"

# LMS's own figures, copied as they are; zero for the other ways.
_COUNTS = (
    "bytes_out_per_step",
    "bytes_in_per_step",
    "disk_bytes_per_step",
    "recompute_s_per_step",
    "reclaims",
    "plan_s",
    "record_steps",
)

_CSV_COLUMNS = (
    "step",
    "timed",
    "seconds",
    "items_per_s",
    "loss",
    "peak_bytes",
    "bytes_out",
    "bytes_in",
    "reclaims",
)


def result_json(measurement: Measurement) -> dict[str, Any]:
    """Everything a reader needs to believe or repeat the run. Losses cover the warm-up, too."""
    options, stats = measurement.options, measurement.stats
    timed_s = measurement.timed_s
    rate = speed(measurement.items_per_step, timed_s)
    return {
        **_head(options),
        "model_source": source(options.model),
        "device_name": device_name(torch.device(options.device)),
        "parameters": measurement.parameters,
        "budget_bytes": stats.get("budget_bytes"),
        "cap_bytes": measurement.cap_bytes,
        "warmup_steps": len(measurement.steps) - len(timed_s),
        "steps": len(timed_s),
        "step_s": asdict(spread(timed_s)),
        "wall_s": measurement.wall_s,
        "unit": measurement.network.unit,
        "items_per_s": rate.mean,
        "items_per_s_uncertainty": rate.uncertainty,
        "items_per_s_jitter": rate.jitter,
        "losses": [step.loss.hex() for step in measurement.steps],
        "peak_device_bytes": measurement.peak_device_bytes,
        "peak_reserved_bytes": measurement.peak_reserved_bytes,
        "whole_run_device_bytes": measurement.whole_run_device_bytes,
        "whole_run_reserved_bytes": measurement.whole_run_reserved_bytes,
        "peak_host_bytes": measurement.peak_host_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **{name: stats.get(name) or 0 for name in _COUNTS},
        "state": stats.get("state"),
        "plan": stats.get("plan"),
        "predicted": stats.get("predicted"),
        "flags": asdict(measurement.flags),
        **_tail(),
    }


def failed_json(options: BenchOptions, error: str) -> dict[str, Any]:
    """A run that did not reach its end: what it was, and the first line of why."""
    return {**_head(options), "error": (error.strip() or "no message").splitlines()[0], **_tail()}


def write_csv(measurement: Measurement, path: Path) -> None:
    """One row per step, warm-up included (``timed`` 0)."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(_CSV_COLUMNS)
        for step in measurement.steps:
            rate = measurement.items_per_step / max(step.seconds, 1e-12)
            rows.writerow(
                [step.number, int(step.timed), f"{step.seconds:.6f}", f"{rate:.3f}", step.loss]
                + [step.peak_bytes, step.bytes_out, step.bytes_in, step.reclaims]
            )


def _head(options: BenchOptions) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "way": options.way.value,
        "lms": options.way is Way.LMS,
        "model": options.model,
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "dtype": options.dtype,
        "device": options.device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "budget": options.budget,
        "optimizer": options.optimizer,
        "seed": options.seed,
        "sizes": {
            name: getattr(options, name)
            for name in ("hidden", "layers", "heads", "kv_heads", "sequence", "vocab", "width", "norm")
        }
        if options.model in ("llama", "unet3d")
        else {},
    }


def _tail() -> dict[str, Any]:
    return {
        "date": provenance.now(),
        "host": provenance.host_facts(),
        "code": provenance.code_hash(),
        "command": provenance.command_line(),
    }
