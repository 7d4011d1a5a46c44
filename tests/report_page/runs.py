"""Runs to draw: synthetic tapes with the plans that the planner makes for them."""

from __future__ import annotations

from functools import cache

from tapes import GIB, cpu, gpu, resnet, transformer

from tests.core.test_drops import blocks
from torchlms.core import joint, planner
from torchlms.core.machine import Machine
from torchlms.core.plan import Budget, Choice
from torchlms.core.rules import Rules
from torchlms.core.tape import Tape
from torchlms.report_page.run import Run
from torchlms.report_page.step import step_of

STATS = {
    "state": "guard", "steps": 30, "measured_step_s": 0.25, "reclaims": 3, "starved_convolutions": 1,
    "late_fetches": 0, "bytes_out_per_step": 5 << 30, "peak_device_bytes": 3 << 30,
}  # fmt: skip
NAMES = ("host", "disk", "recompute", "ledger", "kept", "planless")


@cache
def run(name: str) -> Run:
    """A run whose plan does what its name says."""
    tape, machine = (resnet(8), gpu())
    host_bytes, disk_bytes, share, rules = 80 * GIB, 0, 0.6, Rules()
    if name == "disk":
        tape, host_bytes, disk_bytes = transformer(4), 600 << 20, 80 * GIB
    elif name == "recompute":
        tape, machine, rules = blocks(6), gpu(link=5e9), Rules(recompute=True)
    elif name == "ledger":
        machine, disk_bytes = cpu(), 80 * GIB
    elif name == "kept":
        share = 2.0
    if name == "planless":
        return Run(tape, machine)
    made = _planned(tape, machine, share, host_bytes, disk_bytes, rules)
    return Run(tape, machine, made, STATS, (0.26, 0.25, 0.24), {"rules": {"min_bytes": 0}}, {"torch": "2.13"})


def _planned(
    tape: Tape, machine: Machine, share: float, host_bytes: int, disk_bytes: int, rules: Rules
) -> planner.Plan:
    plain_bytes = step_of(Run(tape, machine)).timeline.peak_device_bytes
    make = joint.plan if rules.recompute else planner.plan
    return make(tape, machine, Budget(int(share * plain_bytes), host_bytes, disk_bytes), rules)


def choices(name: str) -> set[Choice]:
    made = run(name).plan
    return {move.choice for move in made.moves} if made is not None else set()
