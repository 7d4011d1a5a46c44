"""Compiled: what torch.compile with its budget for activations makes of two of our cases. A note, no rival.

    python benchmarks/compiled.py                        each case at each budget
    python benchmarks/compiled.py --only llama-40-0.5    some, added to what the file has of this device
    python benchmarks/compiled.py --device cpu --small   whether it works at all, into build/

Each case is a process of its own: plain eager first, then the model compiled, both without a cap; loss and
optimizer stay eager. Compile time is what the warm-up steps take beyond steps at speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
from facts import device_facts, found_before, without_paths
from result_file import FOLDER, save
from rows import ROWS
from training import Trainer, flags_of, measure_plain, resolved, tidy

from torchlms.bench import provenance
from torchlms.bench.options import BenchOptions, Way

CASES = {
    f"{name.removeprefix('joint-')}-{budget}": (name, budget)
    for name in ("joint-resnet50-b400", "joint-llama-40")
    for budget in (1.0, 0.5, 0.25)
}
BACKENDS = {"cuda": "inductor", "cpu": "aot_eager_decomp_partition"}  # the latter needs no C++ compiler
NOTE = (
    "A note, not a rival: its budget is no number of bytes, and losses need not be eager's to the last bit."
)
_WARMUP, _STEPS, _LIMIT_S, _MOST_TEXT = 3, 5, 300, 400


def main(arguments: list[str] | None = None) -> int:
    asked = _arguments(arguments)
    if asked.case:
        print(json.dumps(measure(asked.case, asked.device, small=asked.small)))
        return 0
    path = (FOLDER.parents[1] / "build" if asked.small else FOLDER) / "compiled.json"
    head = {
        "schema": "torchlms.compiled/1",
        "note": NOTE,
        "command": "python benchmarks/compiled.py",
        **device_facts(torch.device(asked.device)),
        "code": provenance.code_hash(parts=provenance.RIVAL_PARTS),
    }
    found = {one["case"]: one for one in found_before(path, head).get("cases", [])}
    for name in filter(lambda name: asked.only in name, CASES):
        found[name] = in_a_process(name, asked)
        cases = [found[case] for case in CASES if case in found]
        save({**head, "date": provenance.now(), "cases": cases}, path)
    return 0


def in_a_process(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    """The case, or why there is nothing of it."""
    command = [sys.executable, __file__, "--case", name, "--device", asked.device]
    command += ["--small"] * asked.small
    # What was compiled before would come from a cache, and compiling seem to take no time.
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=_LIMIT_S)
        found = {"error": f"exit code {done.returncode}"}
        if not done.returncode:
            found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"error": f"no result in {_LIMIT_S} s"}
    print(name, found, flush=True)
    return {"case": name, "row": CASES[name][0], "activation_memory_budget": CASES[name][1], **found}


def measure(name: str, device: str, *, small: bool) -> dict[str, Any]:
    """Plain eager, then compiled, and the one over the other."""
    row, budget = ROWS[CASES[name][0]], CASES[name][1]
    sizes = {"batch_size": 2, "image_size": 64, "hidden": 32, "layers": 2, "sequence": 64, "vocab": 50}
    changed: dict[str, Any] = {"device": device, **(sizes if small else {})}
    row = replace(row, options=replace(row.options, **changed))
    options, backend = resolved(row), BACKENDS[device]
    with flags_of(row):
        if row.strict:
            torch.use_deterministic_algorithms(True, warn_only=False)
        plain = attempt(lambda: measure_plain(options, _WARMUP, _STEPS, ledger=False))
        compiled = attempt(lambda: measure_compiled(options, budget, backend))
    found: dict[str, Any] = {"backend": backend, "plain": plain, "compiled": compiled}
    if not {"error"} & {*plain, *compiled}:
        found["of_plain"] = plain["step_s"]["median"] / compiled["step_s"]["median"]
        for kind in ("device", "reserved"):
            ours, its = (entry[f"peak_{kind}_bytes"] for entry in (compiled, plain))
            found[f"peak_{kind}_of_plain"] = ours / its if its else None  # not counted on the CPU
    return found


def measure_compiled(options: BenchOptions, budget: float, backend: str) -> dict[str, Any]:
    """As plain is measured; what compiling left with the allocator is given back before the other steps."""
    tidy()
    trainer = Trainer(replace(options, way=Way.NONE, budget=None))
    with functorch_config.patch(activation_memory_budget=budget):
        trainer.workload.model.compile(backend=backend)
        trainer.step()
        tidy()
        trainer.step(_WARMUP - 1)
        trainer.start_timing()
        trainer.step(_STEPS)
    entry = trainer.entry("compiled")
    return {**entry, "compile_s": sum(entry["warmup_s"]) - _WARMUP * entry["step_s"]["median"]}


def attempt(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or the error with its text: Dynamo's first line alone does not say why."""
    try:
        return measured()
    except Exception as error:
        traceback.print_exc()
        return {"error": without_paths(f"{type(error).__name__}: {error}")[:_MOST_TEXT]}


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help=f"cases with this in their names: {', '.join(CASES)}")
    parser.add_argument("--device", choices=list(BACKENDS), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks; their figures mean nothing")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
