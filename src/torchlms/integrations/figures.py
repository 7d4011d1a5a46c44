"""Key figures: the few numbers of a report that belong into a trainer's log."""

from __future__ import annotations

from torchlms.api import LMS

_MEASURED = {
    "lms_peak_bytes": "peak_reserved_bytes",
    "lms_bytes_out_per_step": "bytes_out_per_step",
    "lms_bytes_in_per_step": "bytes_in_per_step",
    "lms_step_s": "measured_step_s",
}
_PREDICTED = {"lms_predicted_peak_bytes": "peak_reserved_bytes", "lms_predicted_step_s": "step_s"}


def key_figures(lms: LMS) -> dict[str, float]:
    """Measured and, once there is a plan, predicted; a step is one forward and backward pass. What is not
    known yet, since no step has followed a plan or none was timed, is left out: no curve begins at a false
    0."""
    stats = lms.stats()
    planned = bool(stats.get("predicted"))
    measured = {
        name: float(stats[key])
        for name, key in _MEASURED.items()
        if stats.get(key) or (planned and key != "measured_step_s")
    }
    predicted = {
        name: float(stats["predicted"][key]) for name, key in _PREDICTED.items() if stats.get("predicted")
    }
    return measured | predicted
