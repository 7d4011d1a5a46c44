"""Soak: thousands of small steps whose shapes change all the time; is memory flat, and are the bits right?

    python benchmarks/soak.py --steps 4000

Trains a small transformer plainly and under LMS on the CPU, with batch and sequence drawn anew for each
step, evaluation in between, and one step in a hundred given up half-way. Compares all losses, parameters
and optimizer states; writes memory on every tier over time to benchmarks/results/soak-cpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import random
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlms
from torchlms.bench import provenance

RESULT = Path(__file__).with_name("results") / "soak-cpu.json"
BATCHES, SEQUENCES, WORDS, WIDTH = (2, 3, 4, 8), (16, 32, 48), 64, 64
BUDGET_BYTES = 6 << 20
GIVEN_UP = 100  # one step in so many
EVALUATED = 50


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the process."""

    step: int
    step_s: float  # median since the sample before
    rss_bytes: int
    live_bytes: int  # of the ledger
    spill_bytes: int  # in use
    spill_peak_bytes: int
    objects: int  # that the collector knows
    threads: int


class Model(nn.Module):
    """Embedding, two encoder layers with dropout, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(ids)))


@dataclass
class Training:
    """A model, its optimizer, and the losses so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[str]

    @staticmethod
    def begin() -> Training:
        torch.manual_seed(7)
        model = Model()
        return Training(model, torch.optim.AdamW(model.parameters(), lr=1e-3), [])

    def step(self, number: int) -> None:
        draw = random.Random(number)
        shape = (draw.choice(BATCHES), draw.choice(SEQUENCES))
        ids = torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(ids).flatten(0, 1), ids.roll(1, 1).flatten())
        if number % GIVEN_UP == GIVEN_UP - 1:
            return  # as if the batch were bad
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()).hex())
        if number % EVALUATED == 0:
            self.model.eval()
            with torch.no_grad():
                self.model(ids)
            self.model.train()

    def state(self) -> list[Tensor]:
        states = self.optimizer.state_dict()["state"].values()
        return [*self.model.state_dict().values(), *(item for state in states for item in state.values())]


def main() -> int:
    asked = _arguments()
    torch.set_num_threads(1)
    plain = Training.begin()
    for number in range(asked.steps):
        plain.step(number)
    ours = Training.begin()
    began_s = time.perf_counter()
    with torchlms.LMS(
        ours.model, ours.optimizer, budget=BUDGET_BYTES, rules={"min_bytes": 4096}, recompute=asked.recompute
    ) as lms:
        samples = list(_soak(ours, lms, asked.steps, asked.every))
        stats = lms.stats()
    same = ours.losses == plain.losses and all(map(_same, ours.state(), plain.state()))
    for sample in samples:
        print(asdict(sample))
    result = {
        "schema": "torchlms.soak/1",
        "command": f"python benchmarks/soak.py --steps {asked.steps}" + (" --recompute" * asked.recompute),
        "same_bits": same,
        "steps": asked.steps,
        "seconds": round(time.perf_counter() - began_s, 1),
        "budget_bytes": BUDGET_BYTES,
        "stats": {name: item for name, item in stats.items() if isinstance(item, (int, float, str))},
        "samples": [asdict(sample) for sample in samples],
        "growth": _growth(samples),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "code": provenance.code_hash(),
        "host": provenance.host_facts(),
    }
    asked.json.write_text(json.dumps(result, indent=1) + "\n")
    print({name: result[name] for name in ("same_bits", "growth", "seconds")})
    return 0 if same else 1


def _soak(training: Training, lms: torchlms.LMS, steps: int, every: int) -> Any:
    times_s: list[float] = []
    for number in range(steps):
        began_s = time.perf_counter()
        training.step(number)
        times_s.append(time.perf_counter() - began_s)
        if (number + 1) % every == 0:
            yield _look(number + 1, statistics.median(times_s), lms)
            times_s.clear()


def _look(step: int, step_s: float, lms: torchlms.LMS) -> Sample:
    gc.collect()
    assert lms._engine is not None
    spill = lms._engine.store.spill
    ledger = getattr(lms._engine.device, "ledger", None)
    return Sample(
        step=step,
        step_s=round(step_s, 5),
        rss_bytes=psutil.Process().memory_info().rss,
        live_bytes=ledger.live_bytes if ledger is not None else 0,
        spill_bytes=spill.in_use_bytes if spill is not None else 0,
        spill_peak_bytes=spill.peak_bytes if spill is not None else 0,
        objects=len(gc.get_objects()),
        threads=threading.active_count(),
    )


def _growth(samples: list[Sample]) -> dict[str, float]:
    """The last quarter's median over the second quarter's: 1.0 is flat. The first quarter still plans."""
    quarter = max(1, len(samples) // 4)
    before, after = samples[quarter : 2 * quarter], samples[-quarter:]
    found = {}
    for name in ("step_s", "rss_bytes", "live_bytes", "spill_peak_bytes", "objects"):
        with contextlib.suppress(ZeroDivisionError, statistics.StatisticsError):
            ratio = statistics.median(getattr(s, name) for s in after) / statistics.median(
                getattr(s, name) for s in before
            )
            found[name] = round(ratio, 4)
    return found


def _same(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="steps to train, plainly and under LMS")
    parser.add_argument("--every", type=int, default=200, help="steps between two looks at the process")
    parser.add_argument("--recompute", action="store_true", help="values may also be dropped and made again")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the result goes")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
