"""Callbacks: which share of a training run the callback of each trainer takes for itself.

    python benchmarks/callbacks.py                     the examples of all three trainers, three runs each
    python benchmarks/callbacks.py mnist_lightning     one of them

Runs the examples as they stand, each run in a process of its own. What counts as the callback's is the
processor time of its own methods, without that of entering and leaving LMS, which a plain ``with LMS`` takes
as well: both in one run, for two runs of a busy machine differ by more than a callback takes. Of the runs the
largest share counts. Writes benchmarks/results/callbacks.json. Fails if one takes more than one per cent.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from facts import device_facts
from result_file import FOLDER, save

import torchlms
from torchlms.bench import provenance

MOST = 0.01
EXAMPLES = {  # by their name in examples/: where the callback is, and what it is for
    "mnist_huggingface": ("huggingface", "transformers"),
    "mnist_lightning": ("lightning", "lightning"),
    "mnist_keras": ("keras", "keras"),
}
_ROOT = Path(__file__).resolve().parent.parent
_EPOCHS = 20
_RUNS = 3


@dataclass
class Clock:
    """Processor time, of which some parts are counted."""

    own_s: float = 0.0
    calls: int = 0

    def counts(self, function: Callable[..., Any], sign: int) -> Callable[..., Any]:
        """``function``, whose time is added, or taken off where it runs inside of one that is added."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began_s = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.own_s += sign * (time.process_time() - began_s)
                self.calls += sign > 0

        return call


def main(arguments: list[str] | None = None) -> int:
    asked = _arguments(arguments)
    if asked.one:
        print(json.dumps(run_one(asked.examples[0], asked.epochs)))
        return 0
    found = {name: _tried(name, asked) for name in asked.examples}
    result = {
        "schema": "torchlms.callbacks/1",
        "command": "python benchmarks/callbacks.py",
        **device_facts(torch.device("cpu")),
        "most_share": MOST,
        "examples": found,
        "date": provenance.now(),
        "code": provenance.adapters_hash(),
    }
    save(result, asked.json)
    for name, one in found.items():
        print(f"{name}: {one['share']:.3%} of the run, {one['own_us_per_step']:.0f} us a step")
    return 0 if all(one["share"] <= MOST for one in found.values()) else 1


def _tried(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """What came of the runs of one example."""
    runs = [_one(name, asked.epochs) for _ in range(asked.runs)]
    _, library = EXAMPLES[name]
    return {
        "library": f"{library} {version(library)}",
        "share": max(run["own_s"] / run["run_s"] for run in runs),
        "own_us_per_step": max(run["own_s"] / run["steps"] for run in runs) * 1e6,
        "runs": runs,
    }


def _one(name: str, epochs: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    command = [sys.executable, __file__, name, "--one", "--epochs", str(epochs)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=_surroundings())
    if ended.returncode:
        raise SystemExit(f"{name} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _surroundings() -> dict[str, str]:
    """One thread: with more, the time of others is added to the callback's no less than to the run's."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "KERAS_BACKEND": "torch"}


def run_one(name: str, epochs: int) -> dict[str, Any]:
    """Run an example in this process; its callback's own time beside that of the whole."""
    clock = Clock()
    adapter, _ = EXAMPLES[name]
    callback = importlib.import_module(f"torchlms.integrations.{adapter}").LMSCallback
    for method in [each for each in vars(callback) if each.startswith("on_")]:
        setattr(callback, method, clock.counts(vars(callback)[method], 1))
    entered: list[torchlms.LMS] = []
    enter = torchlms.LMS.__enter__

    def entering(lms: torchlms.LMS) -> torchlms.LMS:
        entered.append(lms)
        return enter(lms)

    torchlms.LMS.__enter__ = clock.counts(entering, -1)  # type: ignore[method-assign]
    torchlms.LMS.__exit__ = clock.counts(torchlms.LMS.__exit__, -1)  # type: ignore[method-assign]
    sys.argv = [name, "--epochs", str(epochs)]
    began_s = time.process_time()
    runpy.run_path(str(_ROOT / "examples" / f"{name}.py"), run_name="__main__")
    run_s = time.process_time() - began_s
    return {
        "run_s": run_s,
        "own_s": clock.own_s,
        "calls": clock.calls,
        "steps": sum(lms.stats()["steps"] for lms in entered),
    }


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("examples", nargs="*", help="all unless some are named")
    parser.add_argument("--epochs", type=int, default=_EPOCHS)
    parser.add_argument("--runs", type=int, default=_RUNS)
    parser.add_argument("--json", type=Path, default=FOLDER / "callbacks.json", help="where the result goes")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    unknown = ", ".join(name for name in asked.examples if name not in EXAMPLES)
    if unknown:
        parser.error(f"no such example: {unknown}; there are {', '.join(EXAMPLES)}")
    asked.examples = asked.examples or list(EXAMPLES)
    return asked


if __name__ == "__main__":
    sys.exit(main())
