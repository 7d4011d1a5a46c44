"""Compare: the same training by other ways, each in a process of its own, and losses bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlms.bench.arguments import to_arguments
from torchlms.bench.options import BenchOptions, Way
from torchlms.bench.result import failed_json

if TYPE_CHECKING:
    from collections.abc import Sequence


def run_apart(options: BenchOptions, *, timeout_s: float) -> dict[str, Any]:
    """One run in its own process; its result, or one with ``error`` if it failed or took too long."""
    with tempfile.TemporaryDirectory(prefix="torchlms-bench-") as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torchlms", "bench", *to_arguments(options), "--json", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return failed_json(options, f"no result in {timeout_s:g} s")
        if path.exists():
            result: dict[str, Any] = json.loads(path.read_text())
            return {**result, "command": " ".join(["torchlms bench", *to_arguments(options)])}
        return failed_json(options, _why(done))


def rival_options(options: BenchOptions, way: Way, *, cap: bool) -> BenchOptions:
    """The same training done ``way``: same seed, same warm-up, no LMS, capped at the budget if asked."""
    capped = cap or way is Way.NONE_CAPPED
    return replace(
        options,
        way=way,
        cap=options.budget if capped else None,
        budget=None,
        host_budget=None,
        disk_dir=None,
        disk_budget=None,
        plan=None,
        recompute=True,
        rule=(),
        verify=False,
        verify_every=0,
        snapshot=False,
    )


@dataclass(frozen=True, slots=True)
class Identity:
    """Two lists of losses, compared as hex: the number of steps and the first that differs (from 1)."""

    steps: int
    first_difference: int | None

    def __str__(self) -> str:
        if self.steps == 0:
            return "losses: nothing to compare"
        if self.first_difference is None:
            return f"losses: identical over {self.steps} steps"
        return f"losses: differ from step {self.first_difference} of {self.steps}"


def compare_losses(ours: Sequence[str], theirs: Sequence[str]) -> Identity:
    """Warm-up steps count like all others. A list that ends early differs where it ends."""
    steps = max(len(ours), len(theirs))
    for index in range(steps):
        if index >= min(len(ours), len(theirs)) or ours[index] != theirs[index]:
            return Identity(steps, index + 1)
    return Identity(steps, None)


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """What a process that left no result said last."""
    if done.returncode < 0:
        why = f"killed by signal {-done.returncode}"
        return why + (" (out of host memory?)" if done.returncode == -9 else "")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"
