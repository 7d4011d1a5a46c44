"""Memory chart: the bytes of a step on its time axis, stacked, beside the budget and what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from torchlms.core.units import bytes_text
from torchlms.report_page import svg
from torchlms.report_page.axis import bytes_ticks, seconds_ticks
from torchlms.report_page.chart import Chart, Key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchlms.core.curve import Bytes
    from torchlms.report_page.axis import Tick
    from torchlms.report_page.bands import Band
    from torchlms.report_page.run import Run
    from torchlms.report_page.step import Step

HEIGHT = 300.0
MOST_POINTS = 700  # more cannot be told apart
_AIR = 1.06  # above the highest line


def shown_ops(curve: Bytes, most: int = MOST_POINTS) -> tuple[int, ...]:
    """The ops that are drawn: all, or of each group of neighbours the one with the most bytes."""
    count = len(curve)
    if count <= most:
        return tuple(range(count))
    groups = np.array_split(np.arange(count), most)
    return tuple(int(group[curve[group].argmax()]) for group in groups)


def memory_chart(
    run: Run, step: Step, bands: Sequence[Band], measured: Mapping[int, int] | None = None, name: str = ""
) -> Chart:
    """Predicted, stacked; as lines the budget, the step with nothing moved, and the peaks measured.

    ``measured`` is what was allocated during each op of one step, called ``name``, by the op."""
    levels, measured = _levels(run), measured or {}
    plain_most = int(step.plain_bytes.max(initial=0))
    levels_most = max((level for _, _, level in levels), default=1)
    most = _AIR * max(step.timeline.peak_device_bytes, plain_most, levels_most, *measured.values(), 1)
    ops = shown_ops(step.timeline.memory_bytes)
    shapes = _stack(step, bands, ops, most)
    plain = [_y(float(step.plain_bytes[op]), most) for op in shown_ops(step.plain_bytes)]
    xs = _xs(step, shown_ops(step.plain_bytes))
    shapes.append(svg.stairs(xs, plain, svg.WIDTH, "line plain"))
    if measured:
        shown = _shown_of(measured)
        ys = [_y(measured[op], most) for op in shown]
        shapes.append(svg.stairs(_xs(step, shown), ys, svg.WIDTH, "line seen"))
    for key, _, level in reversed(levels):  # the budget is dashed: what it lies upon is seen, too
        shapes.append(svg.line([(0, _y(level, most)), (svg.WIDTH, _y(level, most))], f"line {key}"))
    legend = _keys(bands)
    legend.append(
        Key("plain", "with nothing moved, at the same ops", f"peak {bytes_text(plain_most)}", line=True)
    )
    if measured:
        peak = f"peak {bytes_text(max(measured.values()))}"
        legend.append(Key("seen", f"measured in {name}, at the same ops", peak, line=True))
    legend += [Key(key, what, bytes_text(level), line=True) for key, what, level in levels]
    return Chart(
        svg.drawing(shapes, height=HEIGHT, label="Predicted device memory over one step"),
        300,
        x_ticks=_time_ticks(step),
        y_ticks=bytes_ticks(most),
        legend=tuple(legend),
        timed=True,
    )


def _shown_of(measured: Mapping[int, int]) -> list[int]:
    """The ops that are drawn of those that were measured."""
    ops = sorted(measured)
    return [ops[place] for place in shown_ops(np.array([measured[op] for op in ops], dtype=np.int64))]


def away_chart(step: Step, bands: Sequence[Band]) -> Chart:
    """What is not on the device, by where it is."""
    total = sum(band.size_bytes for band in bands)
    most = _AIR * max(1, int(np.max(total)))
    shapes = _stack(step, bands, shown_ops(np.asarray(total)), most)
    return Chart(
        svg.drawing(shapes, height=HEIGHT, label="Predicted bytes off the device over one step"),
        130,
        x_ticks=_time_ticks(step),
        y_ticks=bytes_ticks(most, wanted=3),
        legend=tuple(_keys(bands)),
        timed=True,
    )


def pointed_at(step: Step, bands: Sequence[Band]) -> dict[str, Any]:
    """What the page says of the moment pointed at: the op, and the bytes of each layer, top first."""
    ops = shown_ops(step.timeline.memory_bytes)
    return {
        "step_s": step.timeline.step_s,
        "start_s": [round(float(step.timeline.start_s[op]), 7) for op in ops],
        "op": [f"{step.tape.ops[op].name} {step.tape.ops[op].module}".strip() for op in ops],
        "bands": [
            {"name": band.name, "bytes": [int(band.size_bytes[op]) for op in ops]} for band in bands[::-1]
        ],
    }


def _keys(bands: Sequence[Band]) -> list[Key]:
    """Top layer first, as they are seen."""
    return [
        Key(band.key, band.name, f"at most {bytes_text(int(band.size_bytes.max()))}") for band in bands[::-1]
    ]


def _levels(run: Run) -> list[tuple[str, str, int]]:
    """Horizontal lines: colour, name, bytes."""
    found = []
    if run.plan is not None:
        found.append(("budget", "budget", run.plan.budget.device_bytes))
    allocated, reserved = (int(run.stats.get(f"peak_{what}_bytes") or 0) for what in ("device", "reserved"))
    if allocated:
        found.append(("measured", "peak measured", allocated))
    if reserved and reserved != allocated:
        found.append(("reserved", "peak measured, reserved by the allocator", reserved))
    return found


def _stack(step: Step, bands: Sequence[Band], ops: Sequence[int], most: float) -> list[str]:
    """Each layer filled down to the ground, the highest first, so that the lower ones lie over it."""
    xs = _xs(step, ops)
    total = np.zeros(len(step.tape.ops), dtype=np.int64)
    shapes = []
    for band in bands:
        total = total + band.size_bytes
        ys = [_y(float(total[op]), most) for op in ops]
        shapes.append(svg.stairs(xs, ys, svg.WIDTH, f"fill {band.key}", ground=HEIGHT))
    return shapes[::-1]


def _xs(step: Step, ops: Sequence[int]) -> list[float]:
    scale = svg.WIDTH / step.timeline.step_s if step.timeline.step_s > 0 else 0.0
    xs = [float(step.timeline.start_s[op]) * scale for op in ops]
    return [0.0, *xs[1:]]


def _y(size_bytes: float, most: float) -> float:
    return HEIGHT * (1 - size_bytes / most)


def _time_ticks(step: Step) -> tuple[Tick, ...]:
    return seconds_ticks(step.timeline.step_s) if step.timeline.step_s > 0 else ()
