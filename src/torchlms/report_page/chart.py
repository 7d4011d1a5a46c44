"""Chart: drawings of a step as SVG, without a library: areas, tracks and a curve."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from torchlms.memory.limits import format_bytes
from torchlms.report_page.course import LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.core.curve import Bytes
    from torchlms.report_page.course import Course

    Sizes = np.ndarray[Any, np.dtype[np.float64]]
    Scale = Callable[[float], float]

WIDTH, LEFT, RIGHT = 1000, 84, 12
_MOST_POINTS = 500
_TICKS = 5
_PLOT = WIDTH - LEFT - RIGHT


def memory_chart(course: Course, *, budget_bytes: int, measured_bytes: int, height: int = 320) -> str:
    """Memory over the step, stacked; a line for the budget, one for the measured peak."""
    step_s = max(course.timeline.step_s, 1e-12)
    top = 1.08 * max(budget_bytes, measured_bytes, int(course.memory_bytes.max(initial=1)))
    groups = _groups(len(course.tape.ops))
    times = [float(course.timeline.start_s[group[0]]) for group in groups] + [step_s]

    def x(time_s: float) -> float:
        return LEFT + _PLOT * time_s / step_s

    def y(size: float) -> float:
        return height - 24 - (height - 34) * size / top

    parts = [_frame(height, step_s, [(y(tick), format_bytes(tick)) for tick in _bytes_ticks(top)])]
    below = np.zeros(len(groups))
    for name in LAYERS:
        above = below + _highest(course.layers_bytes[name], groups)
        parts.append(_area(name, times, below, above, x, y))
        below = above
    for size, label, kind, at, anchor in (
        (budget_bytes, f"budget {format_bytes(budget_bytes)}", "budget", LEFT + 6, "start"),
        (
            measured_bytes,
            f"measured peak {format_bytes(measured_bytes)}",
            "measured",
            WIDTH - RIGHT - 6,  # at the other end, since the two lines may be close
            "end",
        ),
    ):
        if size:
            parts.append(
                f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
                f'y1="{y(size):.1f}" y2="{y(size):.1f}"/>'
                f'<text class="{kind}" x="{at}" y="{y(size) - 4:.1f}" text-anchor="{anchor}">{label}</text>'
            )
    return _svg(height, parts, "Memory over one step")


def tracks_chart(course: Course, *, height: int = 150) -> str:
    """What the compute queue and both directions of the link do over the step."""
    step_s = max(course.timeline.step_s, 1e-12)
    rows = {"compute": 12, "out": 52, "in": 92}
    labels = {"compute": "computing", "out": "copies out", "in": "copies back"}
    parts = [_frame(height, step_s, [(top + 17, labels[name]) for name, top in rows.items()], lines=False)]

    def bar(row: str, kind: str, begin_s: float, end_s: float, title: str) -> str:
        left = LEFT + _PLOT * begin_s / step_s
        width = max(0.6, _PLOT * (end_s - begin_s) / step_s)
        return (
            f'<rect class="{kind}" x="{left:.1f}" y="{rows[row]}" width="{width:.1f}" height="26">'
            f"<title>{escape(title)}</title></rect>"
        )

    parts.append(
        bar("compute", "compute", 0.0, step_s, f"computing: {course.timeline.compute_s * 1e3:.1f} ms")
    )
    for begin_s, end_s in course.stalls_s:
        parts.append(bar("compute", "wait", begin_s, end_s, f"waiting {1e3 * (end_s - begin_s):.2f} ms"))
    for copy in course.timeline.transfers:
        value = course.tape.values[copy.value]
        title = (
            f"{value.op or value.kind.value} in {value.module or 'no module'}: "
            f"{format_bytes(copy.size_bytes)} {copy.direction}, {1e3 * (copy.end_s - copy.start_s):.2f} ms"
        )
        parts.append(bar(copy.direction, copy.direction, copy.start_s, copy.end_s, title))
    return _svg(height, parts, "Queues over one step")


def speed_chart(points: Sequence[tuple[int, float]], chosen: tuple[int, float], *, height: int = 240) -> str:
    """Share of the plain speed against the device budget, and the budget that was chosen."""
    most = max([size for size, _ in points] + [chosen[0], 1])

    def at(size: float, speed: float) -> tuple[float, float]:
        return LEFT + _PLOT * size / most, height - 24 - (height - 40) * speed

    ticks = [(at(0, share)[1], f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    working = [at(size, speed) for size, speed in points if speed > 0]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in working)
    x, y = at(*chosen)
    parts = [
        _frame(height, 0.0, ticks),
        *(
            f'<text class="tick" x="{at(size, 0)[0]:.1f}" y="{height - 6}" '
            f'text-anchor="{"end" if size == most else "middle"}">'
            f"{format_bytes(size)}</text>"
            for size in np.linspace(0, most, _TICKS)
        ),
        f'<polyline class="curve" points="{line}"/>',
        *(f'<circle class="point" cx="{left:.1f}" cy="{top:.1f}" r="3"/>' for left, top in working),
        f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="7"><title>this plan: {chosen[1]:.3f} of the '
        f"speed without a budget, at {format_bytes(chosen[0])}</title></circle>",
    ]
    return _svg(height, parts, "Speed against budget")


def _groups(count: int) -> list[Sequence[int]]:
    """Ops in at most so many neighbouring groups."""
    return [part.tolist() for part in np.array_split(np.arange(count), min(count, _MOST_POINTS)) if len(part)]


def _highest(layer: Bytes, groups: Sequence[Sequence[int]]) -> Sizes:
    return np.array([float(layer[group[0] : group[-1] + 1].max()) for group in groups])


def _area(name: str, times: Sequence[float], below: Sizes, above: Sizes, x: Scale, y: Scale) -> str:
    """A layer between two curves that are flat within each group of ops."""
    upper = [
        (x(time_s), y(above[index])) for index in range(len(above)) for time_s in times[index : index + 2]
    ]
    lower = [
        (x(time_s), y(below[index])) for index in range(len(below)) for time_s in times[index : index + 2]
    ]
    points = " ".join(f"{left:.1f},{top:.1f}" for left, top in [*upper, *lower[::-1]])
    kind = name.replace(" ", "-")
    return f'<polygon class="layer {kind}" points="{points}"><title>{name}</title></polygon>'


def _bytes_ticks(top: float) -> list[float]:
    return [top * part / _TICKS for part in range(_TICKS + 1)]


def _frame(height: int, step_s: float, ticks: Sequence[tuple[float, str]], *, lines: bool = True) -> str:
    parts = []
    for y, label in ticks:
        if lines:
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for part in range(_TICKS + 1) if step_s else ():
        left, label = LEFT + _PLOT * part / _TICKS, f"{1e3 * step_s * part / _TICKS:.0f} ms"
        anchor = "end" if part == _TICKS else "middle"
        parts.append(
            f'<text class="tick" x="{left:.1f}" y="{height - 6}" text-anchor="{anchor}">{label}</text>'
        )
    return "".join(parts)


def _svg(height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
