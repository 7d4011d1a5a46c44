"""Track chart: the queues of a step, one row each, on its time axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchlms.core.units import seconds_text
from torchlms.report_page import svg
from torchlms.report_page.axis import Tick, seconds_ticks
from torchlms.report_page.chart import Chart, Key
from torchlms.report_page.tracks import fewer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchlms.report_page.tracks import Span, Track

MOST_SPANS = 900  # of one lane
_ROW, _GAP = 40.0, 20.0
_NAMES = {
    "forward": "forward",
    "backward": "backward",
    "between": "optimizer and the rest",
    "wait": "waits for a copy",
    "host": "to or from host memory",
    "disk": "to or from disk",
}


def track_chart(tracks: Sequence[Track], step_s: float) -> Chart:
    """A row per queue; the lanes of a queue share its row."""
    height = len(tracks) * (_ROW + _GAP) + _GAP
    scale = svg.WIDTH / step_s if step_s > 0 else 0.0
    shapes, names = [], []
    for row, track in enumerate(tracks):
        top = _GAP + row * (_ROW + _GAP)
        names.append(Tick((top - _GAP + 3) / height, f"{track.name}: busy {_busy(track, step_s)}"))
        thick = _ROW / len(track.lanes)
        for number, lane in enumerate(track.lanes):
            for span in fewer(lane, MOST_SPANS):
                seconds = span.end_s - span.start_s
                title = "; ".join(filter(None, (f"{span.name}, {seconds_text(seconds)}", span.detail)))
                place = (span.start_s * scale, top + number * thick, seconds * scale, thick)
                shapes.append(svg.bar(*place, f"fill {span.key}", title))
    present = {span.key for track in tracks for span in track.spans}
    return Chart(
        svg.drawing(shapes, height=height, label="What each queue does in the planned step"),
        round(1.1 * height),
        x_ticks=seconds_ticks(step_s) if step_s > 0 else (),
        legend=tuple(Key(key, name) for key, name in _NAMES.items() if key in present),
        names=tuple(names),
        timed=True,
    )


def _busy(track: Track, step_s: float) -> str:
    """Seconds in which at least one lane works, and their share of the step."""
    busy_s = _covered_s([span for span in track.spans if span.key != "wait"])
    return f"{seconds_text(busy_s)} ({busy_s / step_s:.0%})" if step_s > 0 else seconds_text(busy_s)


def _covered_s(spans: Sequence[Span]) -> float:
    covered_s = until_s = 0.0
    for span in sorted(spans, key=lambda one: one.start_s):
        covered_s += max(0.0, span.end_s - max(until_s, span.start_s))
        until_s = max(until_s, span.end_s)
    return covered_s
