"""Slower copies: what it costs to count on them, and what is lost where they come and were not counted on.

    python benchmarks/slower_copies.py            six tapes, each planned four times, within three minutes

Records steps of each network on the CPU, at two small batches and with small images, which say what it would
take at a large one; gives that tape the memory and the step time that plain took in a row of an H200; and
plans it for that row's budget, by moving alone and with recompute: once for copies that are as fast as
measured, and once as LMS does (see [Note: Slower copies] in core/planned.py). The simulator then plays both
plans with copies at several speeds. Op times are a CPU's, multiplied: it is about plans against plans and not
about a device. Writes what it saw to benchmarks/results/slower-copies.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from facts import device_facts
from planning import enlarged, entry_of, recorded, result_of
from result_file import FOLDER, save

from torchlms.bench import provenance
from torchlms.bench.options import BenchOptions
from torchlms.core import joint, planner
from torchlms.core.calibrate import Rates, foretold
from torchlms.core.headroom import ELBOW, headroom_bytes
from torchlms.core.machine import Machine
from torchlms.core.plan import Budget, Choice, Plan
from torchlms.core.planned import SLOWER
from torchlms.core.record import from_json
from torchlms.core.rules import Rules
from torchlms.core.tape import Tape
from torchlms.fit.scale import extrapolate

SPEEDS = (1.0, 0.9, 0.8, 0.7)  # of copies, as shares of what was measured
WAYS = {True: "with recompute", False: "moving alone"}
_IMAGE = 64  # pixels a side, and as many images more as there are pixels fewer
_RESNET = BenchOptions("resnet50", image_size=_IMAGE, optimizer="sgd")
_GOOGLENET = BenchOptions("googlenet", image_size=_IMAGE, optimizer="sgd")
_LLAMA = BenchOptions("llama", hidden=64, layers=24, heads=2, sequence=64, vocab=50, optimizer="adamw")
# What is recorded, and at which batch a step of the row's is about as large.
CASES = {
    "ladder-joint-resnet50-b230": (_RESNET, 230 * 224**2 // _IMAGE**2),
    "joint-resnet50-b400": (_RESNET, 400 * 224**2 // _IMAGE**2),
    "joint-resnet50-b800": (_RESNET, 800 * 224**2 // _IMAGE**2),
    "joint-googlenet-8192": (_GOOGLENET, 8192**2 // _IMAGE**2),
    "joint-llama-24": (_LLAMA, 16),
    "joint-llama-40": (_LLAMA, 16),
}
_BATCHES = (2, 4)


def main(arguments: list[str] | None = None) -> int:
    asked = _arguments(arguments)
    torch.set_num_threads(1)
    cases = []
    for row, (options, batch_size) in CASES.items():
        tape = at_its_batch(row, options, batch_size)
        for recompute in WAYS:
            cases.append(compared(row, tape, recompute=recompute))
            print(cases[-1], flush=True)
    result = {
        "schema": "torchlms.slower-copies/1",
        "command": "python benchmarks/slower_copies.py",
        **device_facts(torch.device("cpu")),
        "counted_on": SLOWER,
        "cases": cases,
        "of_bold": {
            way: {str(speed): geometric_mean(cases, way, speed) for speed in SPEEDS} for way in WAYS.values()
        },
        "date": provenance.now(),
        "code": provenance.code_hash(),
    }
    save(result, asked.json)
    print(result["of_bold"])
    return 0


def at_its_batch(row: str, options: BenchOptions, batch_size: int) -> Tape:
    """A step of the row's network, with the memory and the time of the row's own."""
    small, large = (_recorded(replace(options, batch_size=batch)) for batch in _BATCHES)
    return enlarged(extrapolate(small, large, *_BATCHES, batch_size), entry_of(row, "none"))


def compared(row: str, tape: Tape, *, recompute: bool) -> dict[str, Any]:
    """The steps of both plans at each speed of copies."""
    machine: Machine = from_json(Machine, result_of(row)["machine"])
    budget_bytes = entry_of(row, "lms")["budget_bytes"]
    budget = Budget(budget_bytes, machine.host_available_bytes, machine.disk_free_bytes)

    def told(copies: float) -> dict[str, Any]:
        return _told(tape, machine, planned(tape, machine, budget, copies=copies, recompute=recompute))

    return {
        "row": row,
        "way": WAYS[recompute],
        "budget_bytes": budget.device_bytes,
        "bold": told(1.0),
        "wary": told(SLOWER),
    }


@cache  # several rows are of one network
def _recorded(options: BenchOptions) -> Tape:
    return recorded(options)


def planned(tape: Tape, machine: Machine, budget: Budget, *, copies: float, recompute: bool) -> Plan:
    """As LMS plans on a device, but for copies at this share of their speed."""
    spare_bytes = headroom_bytes(machine, budget.device_bytes, drops=recompute)
    make = joint.plan if recompute else planner.plan
    rules = Rules(recompute=recompute)
    return make(tape, machine, budget, rules, headroom_bytes=spare_bytes, elbow=ELBOW, copies=copies)


def _told(tape: Tape, machine: Machine, plan: Plan) -> dict[str, Any]:
    dropped = [move for move in plan.moves if move.choice is Choice.RECOMPUTE]
    return {
        "values_moved": len(plan.moves) - len(dropped),
        "values_dropped": len(dropped),
        "bytes_out": plan.predicted.bytes_out,
        "step_s": {str(speed): foretold(tape, machine, plan, Rates(copies=speed)).step_s for speed in SPEEDS},
    }


def geometric_mean(cases: list[dict[str, Any]], way: str, speed: float) -> float:
    """Of the wary plans' steps over the bold ones', with copies at ``speed``."""
    return statistics.geometric_mean(
        case["wary"]["step_s"][str(speed)] / case["bold"]["step_s"][str(speed)]
        for case in cases
        if case["way"] == way
    )


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=FOLDER / "slower-copies.json", help="where the result goes"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
