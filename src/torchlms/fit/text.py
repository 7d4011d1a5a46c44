"""Text: an answer for a person to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchlms.core.units import bytes_text, seconds_text
from torchlms.fit.outlook import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.core.plan import Prediction
    from torchlms.fit.answer import Answer, Largest
    from torchlms.fit.curve import CurvePoint
    from torchlms.fit.largest import Batch

CURVE_COLUMNS = ("budget", "step", "speed", "", "waiting", "out", "bound")
LARGEST_COLUMNS = ("largest batch", "is", "step", "samples/s", "speed", "out")

_MORE = 1 + 1e-6  # than sums in another order come to
_BAR_CELLS = 12  # with frames the table then fits into 80 columns; a cut bar would mislead


def sentence(answer: Answer) -> str:
    """Does it fit, and at what cost; if not, what would be enough and which op asks for it."""
    outlook, evidence = answer.outlook, answer.evidence
    budget = bytes_text(outlook.budget.device_bytes)
    batch = f" at batch {evidence.batch_size}" if evidence.batch_size else ""
    what = f"{evidence.tape.model or 'the step'}{batch}"
    predicted = outlook.predicted
    if predicted is None:
        return f"{what} does not fit in {budget}: {_why_not(answer)}"
    rate = f", {_rate(answer.samples_per_s)} samples/s" if evidence.batch_size else ""
    step = f"{seconds_text(predicted.step_s)} a step{rate}"
    if outlook.verdict is Verdict.FITS:
        return f"{what} fits in {budget}: it needs {bytes_text(outlook.plain_bytes)} at its peak; {step}"
    disk = f" ({bytes_text(predicted.disk_bytes)} of it to disk)" if predicted.disk_bytes else ""
    means = _means(predicted, outlook.plain_s)
    return (
        f"{what} fits in {budget} with {means}, at {outlook.speed:.0%} of the speed: {step}, "
        f"{bytes_text(predicted.bytes_out)} out per step{disk}; in memory it would need "
        f"{bytes_text(outlook.plain_bytes)} and take {seconds_text(outlook.plain_s)}"
    )


def _means(predicted: Prediction, plain_s: float) -> str:
    """What makes it fit."""
    if predicted.compute_s <= _MORE * plain_s:
        return "moving"
    return "moving and recomputing" if predicted.bytes_out else "recomputing"


def _why_not(answer: Answer) -> str:
    outlook, narrow = answer.outlook, answer.outlook.narrow
    if outlook.verdict is Verdict.HOST_TOO_SMALL:
        host, disk = bytes_text(outlook.budget.host_bytes), bytes_text(outlook.budget.disk_bytes)
        missing = f"{bytes_text(outlook.missing_bytes)} for what must leave the device"
        if answer.evidence.tape.device == "cpu":  # host memory is the device itself
            return f"disk ({disk}) lacks {missing}"
        return f"host memory and disk ({host}, {disk}) lack {missing}"
    return (
        f"the smallest budget is {bytes_text(outlook.smallest_bytes)} ({outlook.smallest_bytes} bytes), "
        f"because of {narrow.name} (op {narrow.op}) in {narrow.module or 'no module'}, which needs "
        f"{bytes_text(narrow.operands_bytes)} for itself beside what cannot move"
    )


def basis(answer: Answer) -> str:
    """What the answer rests on."""
    evidence = answer.evidence
    how = "extrapolated from" if evidence.extrapolated else "from"
    if not all(item.batch_size for item in evidence.recordings):
        return f"predicted, {how} a recording of a batch that --batch may name, on {evidence.tape.device}"
    recorded = " and ".join(str(item.batch_size) for item in evidence.recordings)
    batches = "batches" if len(evidence.recordings) > 1 else "batch"
    return f"predicted, {how} recordings of {batches} {recorded} on {evidence.tape.device}"


def curve_rows(points: Sequence[CurvePoint]) -> list[list[str]]:
    """A row per budget; the bar is the share of the full speed."""
    return [
        [
            bytes_text(point.budget_bytes),
            seconds_text(point.step_s),
            f"{point.speed:.0%}",
            bar(point.speed),
            seconds_text(point.stall_s) if point.stall_s else "-",
            bytes_text(point.bytes_out) if point.bytes_out else "-",
            seconds_text(point.lower_bound_s),
        ]
        for point in points
    ]


def bar(share: float) -> str:
    """``####........`` for a third."""
    cells = round(min(1.0, max(0.0, share)) * _BAR_CELLS)
    return "#" * cells + "." * (_BAR_CELLS - cells)


def largest_rows(largest: Largest) -> list[list[str]]:
    """From the one that moves nothing to the one that just fits."""
    rows = [_batch_row("with nothing moved", largest.unmoved)]
    rows += [_batch_row(f"at {share:.0%} of the speed", batch) for share, batch in largest.keeping]
    return [*rows, _batch_row("that fits at all", largest.fits)]


def _batch_row(name: str, batch: Batch | None) -> list[str]:
    if batch is None:
        return [name, "none", "-", "-", "-", "-"]
    return [
        name,
        f"{'at least ' if batch.at_least else ''}{batch.batch_size}",
        seconds_text(batch.step_s),
        _rate(batch.samples_per_s),
        f"{batch.speed:.0%}",
        bytes_text(batch.bytes_out) if batch.bytes_out else "-",
    ]


def _rate(per_s: float) -> str:
    """``2150``, ``32.5``, ``0.482``."""
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.3g}"
