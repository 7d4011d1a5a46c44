"""Statistics: what a session did, as plain numbers."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

from torchlms.core.drops import Drops, replay_s
from torchlms.core.plan import Plan
from torchlms.core.tape import Tape
from torchlms.eager.counts import Counts
from torchlms.report import choice_totals

if TYPE_CHECKING:
    from torchlms.eager.engine import Engine


def session_stats(engine: Engine | None, *, state: str) -> dict[str, Any]:
    """Counters of ``engine``; peaks and per-step figures are of planned steps once there are any."""
    if engine is None:
        return {"state": state, "steps": 0}
    plan, tape = engine.routines.usual_plan(), engine.routines.usual_tape()
    measured = Counts.of(engine).since(engine.counted_from)
    steps = max(1, measured.steps)
    times = list(engine.step_times_s)[1:] or list(engine.step_times_s)
    peak_bytes, reserved_bytes = _peaks(engine)
    return {
        "state": state,
        "steps": engine.steps,
        "record_steps": sum(routine.recordings for routine in engine.routines),
        "budget_bytes": engine.ladder.budget_bytes,
        "peak_device_bytes": peak_bytes,
        "peak_reserved_bytes": reserved_bytes,
        "active_device_bytes": engine.device.allocated_bytes() - engine.inactive_bytes(),
        "inactive_device_bytes": engine.inactive_bytes(),
        "host_bytes": engine.store.host_bytes(),
        "peak_host_bytes": engine.store.peak_host_bytes,
        "host_budget_bytes": engine.store.host_budget_bytes,
        "pinned_bytes": engine.store.planned_bytes(),
        "bytes_out": engine.store.bytes_out,
        "bytes_in": engine.store.bytes_in,
        "disk_bytes": engine.store.disk_bytes,
        "bytes_out_per_step": measured.bytes_out // steps,
        "bytes_in_per_step": measured.bytes_in // steps,
        "disk_bytes_per_step": measured.disk_bytes // steps,
        "recompute_s_per_step": _recompute_s(tape, plan),
        "replayed_ops": engine.replays,
        "reclaims": engine.ladder.reclaims,
        "reclaims_since_plan": measured.reclaims,
        "single_reclaims": engine.ladder.single_reclaims,
        "full_reclaims": engine.ladder.full_reclaims,
        "reclaimed_bytes": engine.ladder.reclaimed_bytes,
        "retries": engine.ladder.retries,
        "host_refusals": engine.store.host_refusals,
        "disk_overflows": engine.store.overflows,
        "lessons": _lessons(engine),
        "holes_opened": engine.holes.opened,
        "moved_bytes": engine.holes.moved_bytes,
        "late_fetches": engine.late_fetches,
        "starved_convolutions": engine.rooms.starved,
        **_verified(engine),
        "replans": sum(routine.replans for routine in engine.routines),
        "strayed": sum(routine.strayed for routine in engine.routines),
        "measured_step_s": statistics.median(times) if times else 0.0,
        "plan": choice_totals(tape, plan),
        "predicted": _predicted(plan),
        "plan_s": plan.plan_s if plan is not None else 0.0,
    }


def _verified(engine: Engine) -> dict[str, Any]:
    """Whether values are checked, how many came back whole, and their bytes."""
    found = engine.verifier
    if found is None:
        return {"verifying": False, "verified_values": 0, "verified_bytes": 0}
    return {"verifying": True, "verified_values": found.values, "verified_bytes": found.value_bytes}


def _lessons(engine: Engine) -> int:
    """Steps left in which the allocator's habits are learned; a ledger has none."""
    return (
        max((plan.lessons for plan in engine.routines.programs()), default=0) if engine.device.is_cuda else 0
    )


def _recompute_s(tape: Tape | None, plan: Plan | None) -> float:
    """Seconds of a step that go into making values again, by the plan."""
    if tape is None or plan is None:
        return 0.0
    return sum(replay_s(tape, value) for value in Drops.of(tape, plan.moves).through)


def _predicted(plan: Plan | None) -> dict[str, float]:
    if plan is None:
        return {}
    predicted = plan.predicted
    # Holes between blocks fill the headroom that the plan left, and no more than that is there.
    reserved_bytes = plan.budget.device_bytes if plan.moves else predicted.peak_device_bytes
    return {
        "peak_device_bytes": predicted.peak_device_bytes,
        "peak_reserved_bytes": reserved_bytes,
        "step_s": predicted.step_s,
        "compute_s": predicted.compute_s,
        "stall_s": predicted.stall_s,
        "arena_bytes": predicted.arena_bytes,
    }


def _peaks(engine: Engine) -> tuple[int, int]:
    device = engine.device
    if device.is_cuda:
        return (
            int(torch.cuda.max_memory_allocated(device.torch_device)),
            int(torch.cuda.max_memory_reserved(device.torch_device)),
        )
    ledger = getattr(device, "ledger", None)
    peak_bytes = ledger.peak_bytes if ledger is not None else 0
    return peak_bytes, peak_bytes
