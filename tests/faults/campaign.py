"""Campaign: many faults, drawn from a seed, and the table of what came of them."""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from faults.injection import KINDS, Fault
from faults.trial import Found, moments, try_fault

from torchlms.bench.provenance import code_hash, host_facts


def main() -> int:
    """The command: see the package's ``__main__``."""
    parser = argparse.ArgumentParser(description="Inject faults into training under LMS.")
    parser.add_argument("--count", type=int, default=1000, help="Faults to inject.")
    parser.add_argument("--seed", type=int, default=1, help="Which faults.")
    parser.add_argument("--json", type=Path, help="Write the table to this file.")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torchlms").addHandler(logging.NullHandler())
    print(f"{asked.count} faults, seed {asked.seed}")
    began_s = time.perf_counter()
    found = []
    for number, trial in enumerate(trials(asked.count, asked.seed), 1):
        found.append(trial)
        if trial.wrong:
            print(f"WRONG {trial}")
        if number % 50 == 0:
            print(f"{number} faults, {sum(bool(other.wrong) for other in found)} wrong", flush=True)
    wrong = sum(bool(trial.wrong) for trial in found)
    print("\n".join(table(found)))
    if asked.json is not None:
        asked.json.write_text(json.dumps(result(found, asked.seed, time.perf_counter() - began_s), indent=1))
    return 1 if wrong else 0


def trials(count: int, seed: int) -> Iterator[Found]:
    """``count`` faults of all kinds in turn, each at a moment drawn from ``seed``."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            kind = kinds[number % len(kinds)]
            recompute = draw.random() < 0.5
            snapshot = draw.random() < 0.5
            spill_dir = Path(folder)
            moment = draw.randrange(max(1, moments(kind, recompute=recompute, spill_dir=spill_dir)))
            yield try_fault(Fault(kind, moment), spill_dir, snapshot=snapshot, recompute=recompute)


def result(found: list[Found], seed: int, seconds: float) -> dict[str, object]:
    """The committed record: what was injected, and what came of it."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for trial in found:
        kinds[trial.fault.kind][came_of(trial)] += 1
    return {
        "schema": "torchlms.faults/1",
        "command": f"python -m tests.faults --count {len(found)} --seed {seed}",
        "faults": len(found),
        "seed": seed,
        "wrong": sum(bool(trial.wrong) for trial in found),
        "kinds": {kind: dict(sorted(counts.items())) for kind, counts in kinds.items()},
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "code": code_hash(),
        "host": host_facts(),
    }


def came_of(trial: Found) -> str:
    """In two words."""
    if trial.wrong:
        return "wrong"
    return f"raised {trial.errors[0]}" if trial.errors else "survived"


def table(found: list[Found]) -> Iterator[str]:
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for trial in found:
        kinds[trial.fault.kind][came_of(trial)] += 1
    for kind, counts in kinds.items():
        said = ", ".join(f"{number} {what}" for what, number in counts.most_common())
        yield f"{kind:42} {said}"
