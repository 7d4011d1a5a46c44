"""Result: an answer as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torchlms.core.curve import peak_bytes
from torchlms.fit.text import sentence

if TYPE_CHECKING:
    from torchlms.fit.answer import Answer, Largest
    from torchlms.fit.largest import Batch

SCHEMA = "torchlms.fit/1"


def result_json(answer: Answer) -> dict[str, Any]:
    """All figures. ``curve`` and ``largest`` are null where they were not asked for."""
    evidence, outlook = answer.evidence, answer.outlook
    return {
        "schema": SCHEMA,
        "model": evidence.tape.model,
        "batch_size": evidence.batch_size or None,
        "verdict": outlook.verdict.value,
        "answer": sentence(answer),
        "budget_bytes": evidence.budget.device_bytes,
        "host_budget_bytes": evidence.budget.host_bytes,
        "disk_budget_bytes": evidence.budget.disk_bytes,
        "smallest_bytes": outlook.smallest_bytes,
        "narrow": asdict(outlook.narrow),
        "missing_bytes": outlook.missing_bytes,
        "plain": {"peak_device_bytes": outlook.plain_bytes, "step_s": outlook.plain_s},
        "predicted": None if outlook.predicted is None else asdict(outlook.predicted),
        "samples_per_s": answer.samples_per_s,
        "speed": outlook.speed,
        "extrapolated": evidence.extrapolated,
        "recordings": [
            {
                "batch_size": item.batch_size or None,
                "ops": len(item.tape.ops),
                "values": len(item.tape.values),
                "peak_device_bytes": peak_bytes(item.tape),
                "step_s": sum(op.time_s for op in item.tape.ops),
                "device": item.tape.device,
                "torch": item.tape.torch,
            }
            for item in evidence.recordings
        ],
        "machine": evidence.machine.device,
        "curve": None if answer.points is None else [asdict(point) for point in answer.points],
        "largest": None if answer.largest is None else _largest_json(answer.largest),
        "notes": list(answer.notes),
    }


def _largest_json(largest: Largest) -> dict[str, Any]:
    return {
        "fits": _batch_json(largest.fits),
        "unmoved": _batch_json(largest.unmoved),
        "keeping": [{"share": share, "batch": _batch_json(batch)} for share, batch in largest.keeping],
    }


def _batch_json(batch: Batch | None) -> dict[str, Any] | None:
    return None if batch is None else asdict(batch)
