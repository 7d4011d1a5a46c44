"""Page: a run as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlms.core.units import bytes_text, seconds_text
from torchlms.errors import NotSupported
from torchlms.report_page.bands import away_bands, memory_bands
from torchlms.report_page.finding import findings_of
from torchlms.report_page.machine_rows import machine_rows
from torchlms.report_page.measured import measured_bytes
from torchlms.report_page.memory_chart import away_chart, memory_chart, pointed_at
from torchlms.report_page.speed_chart import speed_chart
from torchlms.report_page.step import step_of
from torchlms.report_page.summary import comparison, headline, settings
from torchlms.report_page.track_chart import track_chart
from torchlms.report_page.tracks import tracks_of
from torchlms.report_page.value_rows import MOST_ROWS, module_rows, value_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchlms.fit.curve import CurvePoint
    from torchlms.report_page.profiled import Profiled
    from torchlms.report_page.run import Run

_FOLDER = Path(__file__).resolve().parent


def page(run: Run, points: Sequence[CurvePoint] = (), profiled: Profiled | None = None) -> str:
    """The HTML. ``points`` of ``fit.curve`` draw speed against budget; without any, only the chosen one is.
    ``profiled`` is a step whose memory is drawn beside the predicted one, where it was such a step.

    Raises NotSupported where jinja2 is not installed.
    """
    environment = _environment()
    step = step_of(run)
    bands, away = memory_bands(step), away_bands(step)
    rows = value_rows(step)
    seen: Mapping[int, int] = {}
    if profiled is not None:
        seen = measured_bytes(run.tape, profiled, int(step.timeline.memory_bytes[0]))
    text: str = environment.get_template("page.html").render(
        run=run,
        headline=headline(run, step),
        comparison=comparison(run, step),
        memory=memory_chart(run, step, bands, seen, profiled.name if profiled is not None else ""),
        seen=bool(seen),
        away=away_chart(step, away) if away else None,
        tracks=track_chart(tracks_of(step, has_link=bool(run.machine.link)), step.timeline.step_s),
        speed=speed_chart(run, step, points),
        findings=findings_of(run),
        values=rows[:MOST_ROWS],
        left_out=rows[MOST_ROWS:],
        modules=module_rows(rows),
        machine=machine_rows(run.machine),
        settings=settings(run),
        pointed_at=_inline(pointed_at(step, bands)),
        css=(_FOLDER / "page.css").read_text(),
        js=(_FOLDER / "page.js").read_text(),
    )
    return text


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise NotSupported("the page needs jinja2: pip install '.[report]' in a clone of torchlms") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,  # names of modules are the user's
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"bytes": bytes_text, "seconds": seconds_text}
    return environment


def _inline(data: dict[str, Any]) -> str:
    """JSON that may stand inside a script element, whatever the names in it are."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
