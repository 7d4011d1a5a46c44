"""Worker: one job of one row in a process of its own; a line of JSON for each thing that it finds."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from convolutions import measure_after, measure_before, measure_starved
from facts import device_facts, launch_s
from ladder import WAYS as LADDER_WAYS
from ladder import measure_ladder
from rows import Kind
from training import first_line, flags_of, measure_aside, measure_rival, measure_row

from torchlms.errors import LMSError
from torchlms.memory.arena import Arena
from torchlms.memory.limits import host_available_bytes

if TYPE_CHECKING:
    from rows import Rival, Row

MAIN = "main"
STARVED = "starved"
BEFORE = "before"

_PIECE_BYTES = 2 << 30
_GROW_TRIES = 3


@dataclass(frozen=True, slots=True)
class Job:
    """What one process measures: ``ways`` are the entries that are expected of it."""

    row: Row
    name: str
    ways: tuple[str, ...]
    rival: Rival | None = None
    batch: int = 0


def main_jobs(row: Row) -> list[Job]:
    """What makes the row; the rivals are apart."""
    if row.kind is Kind.CONVOLUTIONS:
        after = [Job(row, f"lms-{batch}", (f"lms-{batch}",), batch=batch) for batch in row.batches]
        return [Job(row, BEFORE, (BEFORE,)), *after, Job(row, STARVED, (STARVED,))]
    if row.kind is Kind.LADDER:
        return [Job(row, MAIN, LADDER_WAYS)]
    ways = ("none", "lms") if row.kind is Kind.ASIDE else ("none", "lms", "none_again")
    return [Job(row, MAIN, ways)]


def rival_jobs(row: Row) -> list[Job]:
    return [Job(row, rival.way.value, (rival.way.value,), rival=rival) for rival in row.rivals]


def all_jobs(row: Row) -> list[Job]:
    return [*main_jobs(row), *rival_jobs(row)]


def work(job: Job, path: Path, *, batch_size: int = 0, cap_bytes: int = 0) -> int:
    """Do the job; a rival with the batch, and under the budget, that LMS had. Everything goes to ``path`` as
    soon as it is known; 1 if it ended in an error."""
    _be_the_first_to_go()
    with path.open("a") as file:

        def emit(what: str, found: Any) -> None:
            file.write(json.dumps({what: found}) + "\n")
            file.flush()

        try:
            if job.row.threads:
                torch.set_num_threads(job.row.threads)
            with flags_of(job.row) as flags:
                if job.row.strict:
                    torch.use_deterministic_algorithms(True, warn_only=False)
                device = torch.device(job.row.options.device)
                emit("facts", device_facts(device))
                emit("flags", asdict(flags))
                host = {"launch_s": launch_s(device)}
                _measure(job, lambda entry: emit("entry", {**entry, **host}), batch_size, cap_bytes)
        except Exception as error:
            traceback.print_exc()
            emit("error", first_line(error))
            return 1
    return 0


def _measure(job: Job, emit: Any, batch_size: int, cap_bytes: int) -> None:
    if job.rival is not None:
        measure_rival(_with_budget(job.row, cap_bytes), job.rival, emit, batch_size)
    elif job.name == BEFORE:
        measure_before(job.row, emit)
    elif job.name == STARVED:
        measure_starved(job.row, emit)
    elif job.batch:
        measure_after(job.row, job.batch, emit)
    elif job.row.kind is Kind.LADDER:
        measure_ladder(job.row, emit)
    elif job.row.kind is Kind.ASIDE:
        measure_aside(job.row, emit)
    else:
        measure_row(job.row, emit)


def _with_budget(row: Row, cap_bytes: int) -> Row:
    """A row whose budget is a share of what plain needs does not know it by itself."""
    if row.options.budget is not None or not cap_bytes:
        return row
    return replace(row, options=replace(row.options, budget=str(cap_bytes)))


def _be_the_first_to_go() -> None:
    """When host memory runs out, this process is ended and not the one that writes results."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def grow_host(wanted_bytes: int) -> None:
    """Some virtual machines get their memory as it is used: use it once, so that it counts as there."""
    _be_the_first_to_go()
    arenas: list[Arena] = []
    try:
        while host_available_bytes() + len(arenas) * _PIECE_BYTES < wanted_bytes:
            if len(arenas) * _PIECE_BYTES >= wanted_bytes or not _some_left():
                break
            arenas.append(Arena(_PIECE_BYTES, pinned=False))
            arenas[-1].touch()
    except LMSError as error:
        print(f"host memory stops growing: {error}")
    finally:
        for arena in arenas:
            arena.close()
    print(f"host memory: {host_available_bytes() / 2**30:.0f} GiB available", flush=True)


def _some_left() -> bool:
    """Whether one more piece can be used, after a moment in which the machine may have grown."""
    for _ in range(_GROW_TRIES):
        if host_available_bytes() > 2 * _PIECE_BYTES:
            return True
        time.sleep(1.0)
    return False
