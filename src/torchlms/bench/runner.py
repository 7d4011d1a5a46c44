"""Runner: one run of the benchmark, from options to a measurement."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torchlms.bench.clock import make_clock
from torchlms.bench.flags import Flags, flags_set
from torchlms.bench.networks import Network, get_network
from torchlms.bench.options import BenchOptions, Way
from torchlms.bench.output import column_line, footer, header, step_line
from torchlms.bench.peak import AllocatorPeak, pinned_peak_bytes, plain_peak_bytes
from torchlms.bench.ways import LMSHandle, apply_way, cap_bytes, capped, open_lms
from torchlms.bench.workload import Workload, make_workload
from torchlms.errors import LMSError

if TYPE_CHECKING:
    from collections.abc import Callable

    Write = Callable[[str], None]

# What torch says when a convolution finds no room for any of its algorithms: no OutOfMemoryError.
_STARVED = "unable to find an engine"


class RunFailed(LMSError):
    """The run did not reach its end; the message says at which step and why."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step. Bytes out and in are per step as LMS counts them; reclaims since the step before."""

    number: int  # from 1, warm-up included
    timed: bool
    seconds: float
    loss: float
    peak_bytes: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    reclaims: int = 0


@dataclass(slots=True)
class Measurement:
    """All that one run gave. ``stats`` is LMS's own, empty for the other ways."""

    network: Network
    options: BenchOptions
    flags: Flags
    parameters: int = 0
    cap_bytes: int | None = None
    steps: list[Step] = field(default_factory=list)
    wall_s: float = 0.0  # timed steps, from the first's start to the last's end, as a wall clock saw it
    peak_device_bytes: int = 0
    peak_reserved_bytes: int = 0
    whole_run_device_bytes: int = 0
    whole_run_reserved_bytes: int = 0
    peak_host_bytes: int = 0
    stats: dict[str, Any] = field(default_factory=dict)
    report: str = ""

    @property
    def items_per_step(self) -> int:
        return self.network.items_per_step(self.options.network_options())

    @property
    def timed_s(self) -> list[float]:
        return [step.seconds for step in self.steps if step.timed]


def run(options: BenchOptions, write: Write, *, watch_steps: bool = False) -> Measurement:
    """Train for ``warmup + num_batches`` steps and measure the latter.

    ``watch_steps`` asks LMS for its figures after every step, outside the timed part.
    """
    network = get_network(options.model)
    options = options.resolve(network)
    device = options.torch_device()
    limit_bytes = cap_bytes(options, device)
    with flags_set(options) as flags, capped(device, limit_bytes):
        measurement = Measurement(network, options, flags, cap_bytes=limit_bytes)
        for line in header(network, options, limit_bytes):
            write(line)
        try:
            _train(measurement, device, write, watch_steps)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _failed(measurement, error) from error
        except RuntimeError as error:
            if _STARVED not in str(error) and "not enough memory" not in str(error):
                raise
            raise _failed(measurement, error) from error
    for line in footer(measurement):
        write(line)
    return measurement


def _train(measurement: Measurement, device: torch.device, write: Write, watch_steps: bool) -> None:
    options = measurement.options

    def make() -> Workload:
        workload = make_workload(measurement.network, options)
        apply_way(workload, options.way)
        return workload

    workload = make()
    measurement.parameters = sum(weight.numel() for weight in workload.model.parameters())
    peak = AllocatorPeak(device, each_step=options.way is not Way.LMS)
    with contextlib.ExitStack() as stack:
        lms = stack.enter_context(open_lms(workload, options)) if options.way is Way.LMS else None
        _loop(measurement, workload, lms, peak, write, watch_steps)
        if lms is not None:
            measurement.stats = dict(lms.stats())
            measurement.report = lms.report()
    del workload
    measurement.peak_device_bytes = max(peak.allocated_bytes, _stat(measurement, "peak_device_bytes"))
    measurement.peak_reserved_bytes = max(peak.reserved_bytes, _stat(measurement, "peak_reserved_bytes"))
    measurement.whole_run_device_bytes = max(peak.whole_allocated_bytes, measurement.peak_device_bytes)
    measurement.whole_run_reserved_bytes = max(peak.whole_reserved_bytes, measurement.peak_reserved_bytes)
    measurement.peak_host_bytes = _stat(measurement, "peak_host_bytes") or pinned_peak_bytes(device)
    if device.type == "cpu" and options.way is not Way.LMS:
        write("Counting peak memory in a second pass")
        measurement.peak_device_bytes = measurement.whole_run_device_bytes = plain_peak_bytes(make)


def _loop(
    measurement: Measurement,
    workload: Workload,
    lms: LMSHandle | None,
    peak: AllocatorPeak,
    write: Write,
    watch_steps: bool,
) -> None:
    options, network = measurement.options, measurement.network
    clock = make_clock(workload.device)
    items = measurement.items_per_step
    reclaims = 0
    started_s = time.perf_counter()
    if options.warmup:
        write(f"Running warm up ({options.warmup} steps)")
    for number in range(1, options.warmup + options.num_batches + 1):
        timed = number > options.warmup
        if number == options.warmup + 1:
            if options.warmup:
                write("Done warm up")
            write(column_line(network.unit))
            peak.start_phase()
            started_s = time.perf_counter()
        clock.start()
        loss_tensor = workload.step()
        seconds = clock.stop()
        stats = lms.stats() if lms is not None and watch_steps else {}
        step = Step(
            number=number,
            timed=timed,
            seconds=seconds,
            loss=float(loss_tensor.item()),
            peak_bytes=peak.after_step() or int(stats.get("peak_device_bytes") or 0),
            bytes_out=int(stats.get("bytes_out_per_step") or 0),
            bytes_in=int(stats.get("bytes_in_per_step") or 0),
            reclaims=int(stats.get("reclaims") or 0) - reclaims,
        )
        reclaims += step.reclaims
        measurement.steps.append(step)
        done = number - options.warmup
        if timed and (done == 1 or done % options.display_every == 0):
            write(step_line(done, items, measurement.timed_s, step.loss, network.unit))
    measurement.wall_s = time.perf_counter() - started_s


def _failed(measurement: Measurement, error: BaseException) -> RunFailed:
    options = measurement.options
    number = len(measurement.steps) + 1
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return RunFailed(
        f"{options.model} batch {options.batch_size}, {options.way.value}: "
        f"out of memory in step {number}: {text}"
    )


def _stat(measurement: Measurement, name: str) -> int:
    return int(measurement.stats.get(name) or 0)
