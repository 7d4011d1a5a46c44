"""Finding: something that went otherwise than it should have, what it means and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchlms.core.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from torchlms.report_page.run import Run

_OFF = 0.07  # of the prediction; less is as good as predicted
_NOTE, _BAD = "note", "bad"
_SLOWER = (
    "A slow data loader, a log and whatever else the loop does count as measured; so does the allocator, "
    "where it has to close holes."
)
_FASTER = "Its ops took longer while they were timed, in the first steps, than they did later."


@dataclass(frozen=True, slots=True)
class Finding:
    """``state`` is ``"ok"`` (it did not happen), ``"note"`` or ``"bad"``."""

    name: str
    count: str
    state: str
    meaning: str


# Key in the stats, name, how bad, what it means and what to do.
_COUNTED = (
    ("reclaims", "Room made at once", _NOTE, "Values left the device because memory ran out, not because the "
     "plan said so. Some are usual while a step is recorded; if they go on, leave the plan more room: a "
     "larger budget, or fewer other programs on the device."),
    ("full_reclaims", "Everything sent away at once", _NOTE, "One op needed so much room that all that could "
     "leave had to. Usual in a recorded step under a tight budget."),
    ("retries", "Ops run again", _NOTE, "An op ran out of memory and was run again after room was made."),
    ("late_fetches", "Values that came late", _NOTE, "Backward asked for a value before the plan had begun "
     "to bring it back, and waited for the whole copy. A few are usual in the first steps; more mean that "
     "the steps differ from the recorded one."),
    ("starved_convolutions", "Convolutions starved", _BAD, "cuDNN found no room for its workspace and chose "
     "another algorithm for the life of the process: slower, and with other bits. Raise the budget and "
     "start again."),
    ("replans", "Plans made again for holes", _NOTE, "Holes between tensors forced evictions in planned "
     "steps; the next plan left more room."),
    ("strayed", "Steps unlike the recorded one", _NOTE, "They were recorded again. If there are many, shapes "
     "or branches change from step to step."),
)  # fmt: skip


def findings_of(run: Run) -> tuple[Finding, ...]:
    """What happened first, the worst before the rest; what did not happen last."""
    if not run.stats:
        return ()
    found = [*_states(run), *_off(run), *_counts(run)]
    order = {_BAD: 0, _NOTE: 1, "ok": 2}
    return tuple(sorted(found, key=lambda finding: order[finding.state]))


def _counts(run: Run) -> list[Finding]:
    found = []
    for key, name, state, meaning in _COUNTED:
        count = int(run.stats.get(key) or 0)
        since = run.stats.get(f"{key}_since_plan")  # what came before is part of learning
        said = str(count) if since is None else f"{count}, {since} of them under this plan"
        found.append(Finding(name, said, state if count and since != 0 else "ok", meaning))
    return found


def _states(run: Run) -> list[Finding]:
    if run.plan is not None:
        return []
    return [
        Finding(
            "No plan",
            str(run.stats.get("state", "")),
            _BAD,
            "Values leave as memory runs out, which is slow. The log says why: the budget is too small for a "
            "plan, or steps keep changing.",
        )
    ]


def _off(run: Run) -> list[Finding]:
    """Where a prediction did not come true."""
    found: list[Finding] = []
    if run.plan is None:
        return found
    predicted, budget_bytes = run.plan.predicted, run.plan.budget.device_bytes
    measured_s = float(run.stats.get("measured_step_s") or 0.0)
    if measured_s and predicted.step_s:
        off = measured_s / predicted.step_s - 1
        found.append(
            Finding(
                "Step time against its prediction",
                f"{off:+.0%}",
                _NOTE if abs(off) > _OFF else "ok",
                f"{seconds_text(measured_s)} measured, {seconds_text(predicted.step_s)} predicted. "
                + (_SLOWER if off > 0 else _FASTER),
            )
        )
    peak_bytes = int(run.stats.get("peak_reserved_bytes") or 0)
    if peak_bytes:
        over = peak_bytes > budget_bytes
        found.append(
            Finding(
                "Peak against the budget",
                f"{peak_bytes / budget_bytes:.1%}",
                _BAD if over else "ok",
                f"{bytes_text(peak_bytes)} measured of {bytes_text(budget_bytes)}."
                + (" The promise was not kept; please report it with this record." if over else ""),
            )
        )
    return found
