"""Tracks: what each queue does in the planned step, as spans on its time axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchlms.core.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from torchlms.core.simulate import Transfer
    from torchlms.report_page.step import Step

_SHORTEST_WAIT_S = 1e-9


@dataclass(frozen=True, slots=True)
class Span:
    """Something that takes its time. ``key`` names its colour, ``detail`` is for whoever points at it."""

    start_s: float
    end_s: float
    key: str
    name: str
    detail: str = ""
    merged: int = 1


@dataclass(frozen=True, slots=True)
class Track:
    """One queue. Spans in a lane do not overlap; lanes are more than one where disk and link work at once."""

    name: str
    lanes: tuple[tuple[Span, ...], ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(span for lane in self.lanes for span in lane)


def tracks_of(step: Step, *, has_link: bool) -> tuple[Track, ...]:
    """The compute queue, copies out, copies back."""
    names = ("copies out", "copies back") if has_link else ("writes to disk", "reads from disk")
    return (
        Track("computing", (compute_spans(step),)),
        *(
            Track(name, _in_lanes(_copy_spans(step, direction)))
            for name, direction in zip(names, ("out", "in"), strict=True)
        ),
    )


def compute_spans(step: Step) -> tuple[Span, ...]:
    """Every op, and every wait for a copy before one or after the last."""
    found: list[Span] = []
    clock_s = 0.0
    timeline = step.timeline
    for index, op in enumerate(step.tape.ops):
        start_s, end_s = float(timeline.start_s[index]), float(timeline.end_s[index])
        if start_s - clock_s > _SHORTEST_WAIT_S:
            found.append(Span(clock_s, start_s, "wait", "waits for a copy", f"before op {index}, {op.name}"))
        found.append(Span(start_s, end_s, op.phase.value, op.name, f"op {index}, {op.module or 'no module'}"))
        clock_s = end_s
    if timeline.step_s - clock_s > _SHORTEST_WAIT_S:
        found.append(Span(clock_s, timeline.step_s, "wait", "waits for a copy", "after the last op"))
    return tuple(found)


def _copy_spans(step: Step, direction: str) -> tuple[Span, ...]:
    """Copies of one direction; one that goes on in the next step is cut where this one ends."""
    found = [
        _copy_span(step, transfer) for transfer in step.timeline.transfers if transfer.direction == direction
    ]
    return tuple(sorted((span for span in found if span.end_s > span.start_s), key=lambda span: span.start_s))


def _copy_span(step: Step, transfer: Transfer) -> Span:
    value = step.tape.values[transfer.value]
    detail = f"{bytes_text(transfer.size_bytes)}, {value.module or 'no module'}"
    waited_s = transfer.start_s - transfer.issued_s
    if waited_s > _SHORTEST_WAIT_S:
        detail += f", {seconds_text(waited_s)} after it was asked for"
    return Span(
        max(0.0, transfer.start_s),
        min(step.timeline.step_s, transfer.end_s),
        transfer.choice.value,
        value.op or value.kind.value,
        detail,
    )


def _in_lanes(spans: tuple[Span, ...]) -> tuple[tuple[Span, ...], ...]:
    """Each span in the first lane that is free when it begins."""
    lanes: list[list[Span]] = []
    for span in spans:
        for lane in lanes:
            if lane[-1].end_s <= span.start_s + _SHORTEST_WAIT_S:
                lane.append(span)
                break
        else:
            lanes.append([span])
    return tuple(tuple(lane) for lane in lanes) or ((),)


def fewer(spans: tuple[Span, ...], most: int) -> tuple[Span, ...]:
    """Neighbours drawn as one where there are more than can be seen."""
    resolution_s = max((span.end_s for span in spans), default=0.0) / (8 * most)
    while len(spans) > most:
        merged: list[Span] = []
        for span in spans:
            last = merged[-1] if merged else None
            if last is None or span.end_s - last.start_s > resolution_s:
                merged.append(span)
                continue
            # Of two colours too narrow to be seen apart, the wider is shown.
            wider = max(last, span, key=lambda one: one.end_s - one.start_s)
            count = last.merged + span.merged
            merged[-1] = Span(last.start_s, span.end_s, wider.key, f"{count} in a row", merged=count)
        spans = tuple(merged)
        resolution_s *= 2
    return spans
