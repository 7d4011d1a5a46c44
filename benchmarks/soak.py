"""Soak: thousands of steps whose shapes change all the time; is everything flat, and are the bits right?

    python benchmarks/soak.py                      4800 steps of a small transformer on the CPU
    python benchmarks/soak.py --device cuda        500 steps of ResNet-50 in 16 GiB, in at most 150 seconds

Trains plainly and under LMS in one process, with evaluation in between, and one step in a hundred given up
half-way. Losses of all steps must be the same, and parameters, buffers and optimizer states after each
quarter. Memory on every tier, threads, open files and step time may not grow beyond the bounds of
soak_sample.py, nothing may be left when LMS ends, and the steps must be done in time. Fails otherwise, and
says why. Writes what it saw to benchmarks/results/soak-<device>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from facts import device_facts
from soak_course import COURSES, Course, Trace, Training
from soak_sample import BOUNDS, FEWEST, Sample, grown, growth, look, open_files

import torchlms
from torchlms.bench import provenance
from torchlms.bench.flags import flags_set
from torchlms.bench.options import BenchOptions
from torchlms.eager import private
from torchlms.memory.arena import pinned_bytes_in_use

FOLDER = Path(__file__).resolve().parent / "results"
_STEPS = {"cpu": 4800, "cuda": 500}
_EVERY = {"cpu": 240, "cuda": 20}
_WITHIN_S = {"cpu": 7200.0, "cuda": 150.0}
_DIGESTS = 4  # over a run
_GRACE_S = 2.0  # for a thread to end
_OTHER_BITS = "not the same bits as plain"


@dataclass
class Soaked:
    """What was seen of the run under LMS, and what was wrong with it."""

    samples: list[Sample] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    wrong: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    began_s = time.monotonic()
    asked = _arguments(arguments)
    torch.set_num_threads(1)
    # Only the flags: nothing else of these options is read.
    with flags_set(BenchOptions(device=asked.device, deterministic=asked.device == "cuda")):
        course = COURSES[asked.device]()
        plain = _trained_plainly(course, asked.steps)
        _tidy()
        soaked = soak(course, plain, asked, began_s + asked.within)
    for sample in soaked.samples:
        print(asdict(sample))
    path = asked.json or FOLDER / f"soak-{asked.device}.json"
    path.write_text(json.dumps(_result(asked, course, soaked), indent=1) + "\n")
    print("\n".join(soaked.wrong) or f"flat, and the same bits, over {soaked.steps} steps")
    return 1 if soaked.wrong else 0


def _trained_plainly(course: Course, steps: int) -> Trace:
    """What a plain run leaves. Its model is gone, for LMS needs the room."""
    training = Training.begin(course)
    for number in range(steps):
        training.step(number)
        _maybe_digest(training, number + 1, steps)
    return training.trace


def soak(course: Course, plain: Trace, asked: argparse.Namespace, ends_s: float) -> Soaked:
    """The run under LMS, and all that is wrong with it."""
    found = Soaked()
    before = {"threads": threading.active_count(), "open files": open_files()}
    with tempfile.TemporaryDirectory(prefix="torchlms-soak-") as folder:
        disk_dir = Path(folder)
        training = Training.begin(course)
        began_s = time.perf_counter()
        with torchlms.LMS(
            training.model,
            training.optimizer,
            budget=course.budget_bytes,
            disk_dir=disk_dir,
            rules=course.rules,
            recompute=asked.recompute,
        ) as lms:
            found.samples = list(_samples(training, lms, disk_dir, asked, ends_s, found))
            found.stats = lms.stats()
        found.seconds = round(time.perf_counter() - began_s, 1)
        found.wrong += _left_behind(disk_dir, before)
    found.wrong += _judged(found, training.trace, plain, asked, course.budget_bytes)
    return found


def _samples(
    training: Training,
    lms: torchlms.LMS,
    disk_dir: Path,
    asked: argparse.Namespace,
    ends_s: float,
    found: Soaked,
) -> Iterator[Sample]:
    times_s: list[float] = []
    for number in range(asked.steps):
        if time.monotonic() > ends_s:
            return
        began_s = time.perf_counter()
        training.step(number)
        times_s.append(time.perf_counter() - began_s)
        found.steps += 1
        _maybe_digest(training, found.steps, asked.steps)
        if found.steps % asked.every == 0:
            yield look(found.steps, statistics.median(times_s), lms, disk_dir)
            times_s.clear()


def _maybe_digest(training: Training, done: int, steps: int) -> None:
    if done == steps or done % max(1, steps // _DIGESTS) == 0:
        training.digest(done)


def _judged(
    found: Soaked, ours: Trace, plain: Trace, asked: argparse.Namespace, budget_bytes: int
) -> Iterator[str]:
    if not ours.same_as(plain):
        yield _OTHER_BITS
    if found.steps < asked.steps:
        yield f"{found.steps} of {asked.steps} steps in {asked.within:.0f} s"
    if len(found.samples) < FEWEST:
        yield f"{len(found.samples)} samples, which say nothing of growth"
    else:
        yield from grown(found.samples)
    if (
        asked.device == "cuda"
        and max((sample.reserved_bytes for sample in found.samples), default=0) > budget_bytes
    ):
        yield "more was reserved than the budget allows"


def _left_behind(disk_dir: Path, before: dict[str, int]) -> Iterator[str]:
    """What is still there after LMS has ended."""
    deadline_s = time.monotonic() + _GRACE_S
    while threading.active_count() > before["threads"] and time.monotonic() < deadline_s:
        time.sleep(0.02)
    now = {"threads": threading.active_count(), "open files": open_files()}
    for what, count in now.items():
        # The driver opens files of its own when memory is first registered.
        if count > before[what] and not (what == "open files" and torch.cuda.is_available()):
            yield f"left behind: {count - before[what]} {what}"
    if pinned_bytes_in_use():
        yield f"left behind: {pinned_bytes_in_use()} pinned bytes"
    if any(disk_dir.iterdir()):
        yield "left behind: files in the disk directory"
    if private.top_dispatch_mode() is not None or private.top_saved_tensor_hooks() is not None:
        yield "left behind: a mode or hooks"


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _result(asked: argparse.Namespace, course: Course, soaked: Soaked) -> dict[str, Any]:
    command = f"python benchmarks/soak.py --device {asked.device} --steps {asked.steps}"
    return {
        "schema": "torchlms.soak/2",
        "command": command + (" --recompute" * asked.recompute),
        "wrong": soaked.wrong,
        "same_bits": _OTHER_BITS not in soaked.wrong,
        "steps": soaked.steps,
        "seconds": soaked.seconds,
        "budget_bytes": course.budget_bytes,
        "bounds": {name: asdict(bound) for name, bound in BOUNDS.items()},
        "growth": growth(soaked.samples) if len(soaked.samples) >= FEWEST else {},
        "stats": {name: item for name, item in soaked.stats.items() if isinstance(item, (int, float, str))},
        "samples": [asdict(sample) for sample in soaked.samples],
        **device_facts(torch.device(asked.device)),
        "date": provenance.now(),
        "code": provenance.code_hash(),
    }


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=list(COURSES), default="cpu")
    parser.add_argument("--steps", type=int, default=0, help="steps to train, plainly and under LMS")
    parser.add_argument("--every", type=int, default=0, help="steps between two looks at the process")
    parser.add_argument("--within", type=float, default=0.0, help="seconds for everything together")
    parser.add_argument("--recompute", action="store_true", help="values may also be dropped and made again")
    parser.add_argument("--json", type=Path, help="where the result goes")
    asked = parser.parse_args(arguments)
    asked.steps = asked.steps or _STEPS[asked.device]
    asked.every = asked.every or _EVERY[asked.device]
    asked.within = asked.within or _WITHIN_S[asked.device]
    return asked


if __name__ == "__main__":
    sys.exit(main())
