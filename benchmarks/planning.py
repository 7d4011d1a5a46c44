"""Planning: how long it takes for a step of ten thousand ops, by moving alone and with recompute.

    python benchmarks/planning.py                 two tapes, three budgets each, every plan made three times

Records a step of a Llama-shaped network on the CPU, gives its tape the memory and the step time of a large
one, and plans it for an H200 in 75%, 50% and 25% of its peak. The second tape has twice the layers and no
target. Of the times of one plan the longest counts. Writes what it saw to benchmarks/results/planning.json.
Fails if planning took longer than it may, or made a plan that does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from facts import device_facts
from result_file import FOLDER, save

import torchlms
from torchlms.bench import provenance
from torchlms.bench.networks import get_network
from torchlms.bench.options import BenchOptions
from torchlms.bench.workload import make_workload
from torchlms.core import joint, planner
from torchlms.core.curve import peak_bytes
from torchlms.core.headroom import ELBOW, headroom_bytes
from torchlms.core.machine import Machine
from torchlms.core.plan import Budget, Choice, Plan
from torchlms.core.record import from_json
from torchlms.core.rules import Rules
from torchlms.core.tape import Phase, Tape
from torchlms.core.validate import validate
from torchlms.errors import BudgetTooSmall

SHARES = (0.75, 0.5, 0.25)  # of the tape's peak
MOST_S = {"moving": 2.0, "joint": 5.0}
_LLAMA = BenchOptions("llama", 8, hidden=32, heads=2, sequence=64, vocab=50, optimizer="adamw")
_LAYERS = 44  # so many ops without the optimizer's, which leave nothing to decide
_STEPS = 4  # one is recorded and two are timed, and then the tape has their times
_RATES, _SIZES = "resnet50-b400", "joint-llama-24"  # results of an H200: its rates; how large is large


def main(arguments: list[str] | None = None) -> int:
    asked = _arguments(arguments)
    torch.set_num_threads(1)
    machine: Machine = from_json(Machine, result_of(_RATES)["machine"])
    tapes = [planned(layers, machine, asked.repeats) for layers in (asked.layers, 2 * asked.layers)]
    result = {
        "schema": "torchlms.planning/1",
        "command": "python benchmarks/planning.py",
        **device_facts(torch.device("cpu")),
        "planned_for": {"device": machine.device, "rates": f"{_RATES}.json", "sizes": f"{_SIZES}.json"},
        "tapes": tapes,
        "targets": judged(*tapes),
        "date": provenance.now(),
        "code": provenance.code_hash(),
    }
    save(result, asked.json)
    print(*result["targets"], sep="\n")
    return 0 if all(target["met"] for target in result["targets"]) else 1


def recorded(options: BenchOptions) -> Tape:
    """The tape of a step on the CPU in which everything fits."""
    network = get_network(options.model)
    workload = make_workload(network, replace(options, device="cpu").resolve(network))
    for group in workload.optimizer.param_groups:
        group["foreach"] = True  # as on a device; else ops of AdamW, ten for each weight, would fill the tape
    with (
        tempfile.TemporaryDirectory(prefix="torchlms-planning-") as folder,
        torchlms.LMS(workload.model, workload.optimizer, budget="4GiB", disk_dir=folder) as lms,
    ):
        for _ in range(_STEPS):
            workload.step()
        assert lms.tape is not None
        return lms.tape


def enlarged(tape: Tape, plain: dict[str, Any]) -> Tape:
    """With the peak and the step time of a large network, as ``plain``, the entry of a result, has them; what
    is larger or longer than another stays so.

    As recorded, copies are short beside the step, and whatever leaves costs nothing: to let small values
    move (min_bytes=0) would give plans without a search, and prove nothing.
    """
    grow = plain["peak_device_bytes"] / peak_bytes(tape)
    slow = plain["step_s"]["median"] / sum(op.time_s for op in tape.ops)
    return replace(
        tape,
        ops=tuple(
            replace(op, time_s=slow * op.time_s, scratch_bytes=int(grow * op.scratch_bytes))
            for op in tape.ops
        ),
        values=tuple(replace(value, size_bytes=int(grow * value.size_bytes)) for value in tape.values),
        resident_bytes=int(grow * tape.resident_bytes),
        device="cuda",
    )


def planned(layers: int, machine: Machine, repeats: int) -> dict[str, Any]:
    """A tape, and its plans for each budget."""
    options = replace(_LLAMA, layers=layers)
    tape = enlarged(recorded(options), entry_of(_SIZES, "none"))
    plans = []
    for share, kind in product(SHARES, MOST_S):
        device_bytes = int(share * peak_bytes(tape))
        budget = Budget(device_bytes, machine.host_available_bytes, machine.disk_free_bytes)
        found = timed(kind, tape, machine, budget, repeats)
        plans.append({"plan": kind, "share": share, "budget_bytes": device_bytes, **found})
        print(f"{len(tape.ops)} ops", plans[-1], flush=True)
    return {
        "layers": layers,
        "ops": len(tape.ops),
        "ops_without_optimizer": sum(op.phase is not Phase.BETWEEN for op in tape.ops),
        "values_that_may_leave": sum(value.movable and bool(value.idle) for value in tape.values),
        "peak_bytes": peak_bytes(tape),
        "compute_s": sum(op.time_s for op in tape.ops),
        "plans": plans,
    }


def timed(kind: str, tape: Tape, machine: Machine, budget: Budget, repeats: int) -> dict[str, Any]:
    """One plan made several times, with the room that LMS leaves on a device; or why there is none."""
    make: Any = joint.plan if kind == "joint" else planner.plan
    spare_bytes = headroom_bytes(machine, budget.device_bytes)
    seconds, own_s = [], []
    for _ in range(repeats):
        began_s = time.perf_counter()
        try:
            plan: Plan = make(tape, machine, budget, Rules(), headroom_bytes=spare_bytes, elbow=ELBOW)
        except BudgetTooSmall as error:
            return {"why_none": str(error)}
        seconds.append(round(time.perf_counter() - began_s, 3))
        own_s.append(round(plan.plan_s, 3))
    dropped = {move.value for move in plan.moves if move.choice is Choice.RECOMPUTE}
    return {
        "slowest_s": max(seconds),
        "seconds": seconds,
        "plan_s": own_s,  # by the plan's own account
        "values_moved": len({move.value for move in plan.moves} - dropped),
        "values_dropped": len(dropped),
        "predicted_step_s": plan.predicted.step_s,
        "faults": len(validate(tape, plan, machine)),
    }


def judged(first: dict[str, Any], *others: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target beside what was found; None where there was no plan. Times are those of the first tape."""
    faults = sum(plan.get("faults", 0) for tape in (first, *others) for plan in tape["plans"])
    targets = [_target("ops", ">= 10000", first["ops"], first["ops"] >= 10_000)]
    targets.append(_target("faults", "<= 0", faults, not faults))
    for kind, most_s in MOST_S.items():
        times_s = [plan.get("slowest_s", 0.0) for plan in first["plans"] if plan["plan"] == kind]
        slowest_s = max(times_s, default=0.0) or None
        targets.append(
            _target(f"{kind}_s", f"<= {most_s:g}", slowest_s, bool(slowest_s and slowest_s <= most_s))
        )
    return targets


def _target(figure: str, target: str, value: float | None, met: bool) -> dict[str, Any]:
    return {"figure": figure, "target": target, "value": value, "met": met}


def result_of(name: str) -> dict[str, Any]:
    """The committed result of a row."""
    return dict(json.loads((FOLDER / f"{name}.json").read_text()))


def entry_of(name: str, way: str) -> dict[str, Any]:
    """One of its entries."""
    return dict(next(entry for entry in result_of(name)["entries"] if entry["way"] == way))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=_LAYERS, help="of the first network")
    parser.add_argument("--repeats", type=int, default=3, help="how often each plan is made")
    parser.add_argument("--json", type=Path, default=FOLDER / "planning.json", help="where the result goes")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
