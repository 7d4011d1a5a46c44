"""Campaign: many faults, drawn from a seed or at every op, and the table of what came of them."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from faults.every_op import Struck, strike_every
from faults.injection import KINDS, Fault
from faults.trial import Found, moments, try_fault

from torchlms.bench.provenance import code_hash, host_facts


def main() -> int:
    """The command: see the package's ``__main__``."""
    asked = _arguments()
    torch.set_num_threads(1)
    logging.getLogger("torchlms").addHandler(logging.NullHandler())
    began_s = time.perf_counter()
    made = every_op(asked.stride) if asked.every_op else at_random(asked.count, asked.seed)
    made |= {
        "seconds": round(time.perf_counter() - began_s, 1),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "code": code_hash(),
        "host": host_facts(),
    }
    if asked.json is not None:
        asked.json.write_text(json.dumps(made, indent=1) + "\n")
    return 1 if made["wrong"] else 0


def at_random(count: int, seed: int) -> dict[str, Any]:
    """``count`` faults of all kinds: what came of each kind."""
    print(f"{count} faults, seed {seed}")
    struck = told(trials(count, seed))
    print("\n".join(table(tally(struck))))
    return {
        "schema": "torchlms.faults/1",
        "command": f"python -m tests.faults --count {count} --seed {seed}",
        "faults": len(struck),
        "seed": seed,
        "wrong": sum(bool(one.found.wrong) for one in struck),
        "kinds": tally(struck),
    }


def every_op(stride: int) -> dict[str, Any]:
    """Out of memory at each op of two steps, with and without snapshots and recomputing: what came of each
    phase."""
    struck: list[Struck] = []
    with tempfile.TemporaryDirectory() as folder:
        for recompute, snapshot in itertools.product((False, True), repeat=2):
            print(f"recompute {recompute}, snapshot {snapshot}", flush=True)
            struck += told(strike_every(stride, Path(folder), snapshot=snapshot, recompute=recompute))
    print("\n".join(table(tally(struck))))
    return {
        "schema": "torchlms.faults/1",
        "command": f"python -m tests.faults --every-op --stride {stride}",
        "faults": len(struck),
        "wrong": sum(bool(one.found.wrong) for one in struck),
        "phases": tally(struck),
    }


def told(struck: Iterable[Struck]) -> list[Struck]:
    """All of them; what is wrong, and how far it has come, is said meanwhile."""
    all_of_them = []
    wrong = 0
    for number, one in enumerate(struck, 1):
        all_of_them.append(one)
        if one.found.wrong:
            wrong += 1
            print(f"WRONG {one.found}")
        if number % 50 == 0:
            print(f"{number} faults, {wrong} wrong", flush=True)
    return all_of_them


def trials(count: int, seed: int) -> Iterator[Struck]:
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
            found = try_fault(Fault(kind, moment), spill_dir, snapshot=snapshot, recompute=recompute)
            yield Struck(kind, found)


def came_of(trial: Found) -> str:
    """In two words."""
    if trial.wrong:
        return "wrong"
    return f"raised {trial.errors[0]}" if trial.errors else "survived"


def tally(struck: list[Struck]) -> dict[str, dict[str, int]]:
    """How often what came of it, by kind of fault or by phase."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in struck:
        counts[one.where][came_of(one.found)] += 1
    return {where: dict(sorted(found.items())) for where, found in counts.items()}


def table(counts: dict[str, dict[str, int]]) -> Iterator[str]:
    for what, found in counts.items():
        said = ", ".join(f"{number} {came}" for came, number in found.items())
        yield f"{what:42} {said}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Inject faults into training under LMS.")
    parser.add_argument("--count", type=int, default=1000, help="Faults to inject.")
    parser.add_argument("--seed", type=int, default=1, help="Which faults.")
    parser.add_argument("--every-op", action="store_true", help="Out of memory at each op of two steps.")
    parser.add_argument("--stride", type=int, default=1, help="With --every-op: at each so many-th op.")
    parser.add_argument("--json", type=Path, help="Write the table to this file.")
    return parser.parse_args()
