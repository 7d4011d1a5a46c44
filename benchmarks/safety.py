"""Safety: what it costs, when nothing goes wrong, to be sure that the bits are right.

    python benchmarks/safety.py                         joint-resnet50-b400, in turns with and without
    python benchmarks/safety.py cpu-transformer         another row of run.py

One training run under one settled plan, some steps as they are and some without, over and over: without the
versions that are checked of every saved tensor, without the barrier that makes a dropped value real before
what it is made from is written, and without the notes of such writes. The steps of a turn are timed
together, as a loop runs them. Without these the run is as right as with them, for nothing goes wrong in it.
Writes benchmarks/results/safety-<row>.json. Fails if they cost more than one per cent.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from facts import device_facts, launch_s
from result_file import FOLDER, save
from rows import ROWS, Kind
from training import Trainer, flags_of, lms_around, measure_plain, resolved, tidy, warm_up

from torchlms.bench import provenance
from torchlms.eager import watcher
from torchlms.eager.provenance import Provenance
from torchlms.eager.saved import Kept, Saved

_MOST = 1.01  # times as long
_ROW = "joint-resnet50-b400"


@contextlib.contextmanager
def without_safety() -> Iterator[None]:
    """As if nothing could ever go wrong."""
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (Saved, "check"),
            (Kept, "check"),
            (watcher, "_make_readers_real"),
            (Provenance, "written"),
        ):
            stack.enter_context(mock.patch.object(owner, name, _nothing))
        yield


def _nothing(*args: Any) -> None:
    """In the place of what is left out."""


def main(arguments: list[str] | None = None) -> int:
    asked = _arguments(arguments)
    row = ROWS[asked.row]
    with flags_of(row):
        options = resolved(row)
        if row.share:
            plain = measure_plain(options, 1, 2)
            need_bytes = plain["whole_run_reserved_bytes" if row.cuda else "peak_device_bytes"]
            options = replace(options, budget=str(int(row.share * need_bytes)))
        tidy()
        trainer = Trainer(options)
        with lms_around(trainer) as lms:
            warm_up(trainer, lms, row.warmup)
            moves = len(lms.plan.moves) if lms.plan is not None else 0
            turns = [in_turns(trainer, asked.steps) for _ in range(asked.turns)]
    ratios = [with_s / without_s for with_s, without_s in turns]
    cost = statistics.median(ratios)
    result = {
        "schema": "torchlms.safety/1",
        "command": f"python benchmarks/safety.py {asked.row}",
        "row": asked.row,
        **device_facts(torch.device(options.device)),
        "launch_s": launch_s(torch.device(options.device)),
        "moves": moves,
        "steps_in_a_turn": asked.steps,
        "turns": [{"with_s": with_s, "without_s": without_s} for with_s, without_s in turns],
        "times_as_long": cost,
        "least": min(ratios),
        "most": max(ratios),
        "met": cost <= _MOST,
        "date": provenance.now(),
        "code": provenance.code_hash(),
    }
    save(result, asked.json or FOLDER / f"safety-{asked.row}.json")
    print(f"{asked.row}: {cost:.4f} times as long with it ({min(ratios):.4f} to {max(ratios):.4f})")
    return 0 if cost <= _MOST else 1


def in_turns(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Seconds of a step with and without, each half of it before the other and half after: what drifts in
    the meantime is the same for both."""
    half = max(1, steps // 2)
    first_s = _steps_s(trainer, half)
    with without_safety():
        without_s = _steps_s(trainer, 2 * half)
    last_s = _steps_s(trainer, half)
    return (first_s + last_s) / (2 * half), without_s / (2 * half)


def _steps_s(trainer: Trainer, count: int) -> float:
    if trainer.workload.device.type == "cuda":
        torch.cuda.synchronize(trainer.workload.device)
    began_s = time.perf_counter()
    trainer.step(count)
    return time.perf_counter() - began_s


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    rows = [name for name, row in ROWS.items() if row.kind is Kind.TRAINING and not row.need_over_cap]
    parser.add_argument("row", nargs="?", default=_ROW, choices=rows, metavar="ROW")
    parser.add_argument("--turns", type=int, default=8, help="how often")
    parser.add_argument("--steps", type=int, default=10, help="with, and as many without, in each turn")
    parser.add_argument("--json", type=Path, default=None, help="where to write it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
