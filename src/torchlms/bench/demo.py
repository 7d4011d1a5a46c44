"""Demo: ResNet-50 plain and under 60% of the memory that it needs; what ``make demo`` shows."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from torchlms.bench.compare import Identity, compare_losses, run_apart
from torchlms.bench.options import BenchOptions, Way
from torchlms.errors import LMSError
from torchlms.memory.limits import format_bytes
from torchlms.outlet import Put, into_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SCHEMA = "torchlms.demo/1"
COLUMNS = ("", "plain", "with LMS")

_SHARE = 0.6
_TIMEOUT_S = 280.0
# On a CPU small enough for two cores; parameters, gradients and momentum, which stay where they are,
# must be well under the budget, hence the batch.
_CPU = BenchOptions(model="resnet50", device="cpu", batch_size=32, image_size=96, num_batches=4, warmup=5)
_CUDA = BenchOptions(
    model="resnet50", device="cuda", batch_size=64, image_size=224, num_batches=20, warmup=20
)


class DemoFailed(LMSError):
    """One of the two runs gave no result, or their losses differ."""


def demo_options() -> BenchOptions:
    """The workload for this machine."""
    return _CUDA if torch.cuda.is_available() else _CPU


def demo(
    write: Callable[[str], None],
    write_table: Callable[[Sequence[str], Sequence[Sequence[str]]], None],
    options: BenchOptions | None = None,
    *,
    put: Put = into_nothing,
) -> Identity:
    """Run plain, then under 60% of that peak with a spill file; print both side by side.

    ``put`` gets the results of both and what came of comparing their losses.
    """
    options = options or demo_options()
    size = f"{options.model}, batch {options.batch_size} at {options.image_size}x{options.image_size}"
    write(f"{size}, on {options.device}: first as it is ...")
    plain = _run(replace(options, way=Way.NONE))
    budget_bytes = int(plain[_peak_name(options)] * _SHARE)
    needs, budget = format_bytes(plain[_peak_name(options)]), format_bytes(budget_bytes)
    write(f"it needs {needs}. Now with a budget of 60% of that:")
    write(f"    with torchlms.LMS(model, optimizer, budget='{budget}'): ...")
    with tempfile.TemporaryDirectory(prefix="torchlms-demo-") as folder:
        disk_dir = folder if options.device == "cpu" else None
        lms = _run(replace(options, way=Way.LMS, budget=str(budget_bytes), disk_dir=disk_dir))
    identity = compare_losses(plain["losses"], lms["losses"])
    write_table(COLUMNS, _rows(options, plain, lms, budget_bytes))
    write(str(identity))
    put({"schema": SCHEMA, "plain": plain, "lms": lms, "losses": asdict(identity)})
    if identity.first_difference is not None:
        raise DemoFailed(f"{identity}; LMS must not change a bit: please report this")
    return identity


def _run(options: BenchOptions) -> dict[str, Any]:
    result = run_apart(options, timeout_s=_TIMEOUT_S)
    if "error" in result:
        raise DemoFailed(f"the run {options.way.value} failed: {result['error']}")
    return result


def _peak_name(options: BenchOptions) -> str:
    """On a GPU the budget binds what the allocator reserves, on a CPU what the ledger counts."""
    return "peak_reserved_bytes" if options.device == "cuda" else "peak_device_bytes"


def _rows(
    options: BenchOptions, plain: dict[str, Any], lms: dict[str, Any], budget_bytes: int
) -> list[list[str]]:
    name = _peak_name(options)
    moved = f"{format_bytes(lms['bytes_out_per_step'])} out, {format_bytes(lms['bytes_in_per_step'])} in"
    if lms["disk_bytes_per_step"]:
        moved += f" ({format_bytes(lms['disk_bytes_per_step'])} through the spill file)"
    return [
        ["budget", "none", format_bytes(budget_bytes)],
        ["peak memory", format_bytes(plain[name]), format_bytes(lms[name])],
        ["step time", *(f"{run['step_s']['median'] * 1e3:.0f} ms" for run in (plain, lms))],
        ["last loss", *(f"{float.fromhex(run['losses'][-1]):.6f}" for run in (plain, lms))],
        ["moved per step", "-", moved],
    ]
