"""Recording: the tape of one batch size; made by training a few steps, or read from a file."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchlms.bench.clock import make_clock
from torchlms.bench.flags import flags_set
from torchlms.bench.networks import get_network
from torchlms.bench.options import Way
from torchlms.bench.ways import open_lms
from torchlms.bench.workload import Workload, make_workload
from torchlms.core.curve import peak_bytes
from torchlms.core.tape import Tape
from torchlms.eager.routine import TIMINGS
from torchlms.errors import BadOption, NotSupported
from torchlms.fit.times import eased
from torchlms.memory.limits import format_bytes, host_available_bytes
from torchlms.outlet import check_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchlms.bench.options import BenchOptions

    Write = Callable[[str], None]

_STEPS = 2 + TIMINGS  # one is recorded, some are timed op by op, and the next begins with their figures
_PLAIN_STEPS = 5  # the first two are not counted
_ROOM_SHARE = 0.9  # of free memory that a plain step may take to be tried


@dataclass(frozen=True, slots=True)
class Recording:
    """One tape and the batch size it was made at; 0 where nobody said."""

    batch_size: int
    tape: Tape


def batches_to_record(batch_size: int) -> tuple[int, ...]:
    """A quarter and a half, which is enough to see the line; of small batches, the batch itself.

    A batch of 1 is left out where it can be: torch treats dimensions of size 1 in ways of their own.
    """
    if batch_size <= 2:
        return (batch_size,)
    if batch_size <= 4:
        return (2, batch_size)
    small = max(2, batch_size // 4)
    return (small, max(small + 1, batch_size // 2))


def record(options: BenchOptions, batch_size: int, write: Write) -> Recording:
    """Train a few steps at ``batch_size`` on the device of ``options`` under LMS without a budget.

    Op times are those of the timed steps, brought to the duration of plain steps where these have
    room (``eased``).
    """
    network = get_network(options.model)
    options = replace(options, batch_size=batch_size, way=Way.LMS, budget=None, plan=None).resolve(network)
    write(f"recording {options.model} at batch {batch_size} on {options.device}")
    with flags_set(options):
        workload = make_workload(network, options)
        with open_lms(workload, options) as lms:
            for _ in range(_STEPS):
                workload.step()
            tape: Tape | None = getattr(lms, "tape", None)
        if tape is None:
            raise NotSupported(
                f"{options.model} at batch {batch_size} gave no tape: nothing was saved for a backward pass"
            )
        step_s = _plain_step_s(workload, peak_bytes(tape))
    tape = replace(tape, model=options.model)
    if step_s is None:
        write("no room for plain steps: op times include what measuring them took; record smaller batches")
    return Recording(batch_size, tape if step_s is None else eased(tape, step_s))


def load(paths: Sequence[Path], batch_sizes: Sequence[int]) -> tuple[Recording, ...]:
    """Tape files with their batch sizes, in the same order; one file may do without."""
    if len(paths) > 2:
        raise BadOption(f"--tape was given {len(paths)} times: one or two tapes are read")
    if len(batch_sizes) != len(paths) and not (len(paths) == 1 and not batch_sizes):
        raise BadOption(
            f"--tape was given {len(paths)} times and --batch {len(batch_sizes)} times: "
            "each tape needs its batch size"
        )
    if any(batch < 1 for batch in batch_sizes):
        raise BadOption(f"--batch {min(batch_sizes)}: a batch size is 1 or more")
    known = batch_sizes or [0]
    return tuple(Recording(batch, Tape.load(path)) for path, batch in zip(paths, known, strict=True))


def save(recordings: Sequence[Recording], path: Path) -> list[Path]:
    """A file for each, named after its batch: ``tape.json`` makes ``tape-50.json``, ``tape-100.json``."""
    check_folder(path)
    written = []
    for recording in recordings:
        place = path.with_name(f"{path.stem}-{recording.batch_size}{path.suffix or '.json'}")
        recording.tape.save(place)
        written.append(place)
    return written


def _plain_step_s(workload: Workload, needs_bytes: int) -> float | None:
    """How long a step takes with nobody watching; None where it has no room or does not say."""
    if needs_bytes > _ROOM_SHARE * _free_bytes(workload.device):
        return None
    clock = make_clock(workload.device)
    times_s = []
    try:
        for _ in range(_PLAIN_STEPS):
            clock.start()
            workload.step()
            times_s.append(clock.stop())
    except torch.OutOfMemoryError:  # the allocator's holes: the timed steps must do
        return None
    return statistics.median(times_s[2:])


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return host_available_bytes()
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(free_bytes) + int(torch.cuda.memory_allocated(device))


def described(recording: Recording) -> str:
    """One line of what a recording holds."""
    tape = recording.tape
    step_ms = 1e3 * sum(op.time_s for op in tape.ops)
    return (
        f"batch {recording.batch_size or '?'}: {len(tape.ops)} ops, {step_ms:.1f} ms, "
        f"{format_bytes(peak_bytes(tape))} at its peak, on {tape.device}"
    )
