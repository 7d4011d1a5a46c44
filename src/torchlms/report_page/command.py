"""Command: ``torchlms report`` without the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlms.core.record import to_json
from torchlms.errors import BadOption
from torchlms.fit.curve import curve
from torchlms.outlet import check_folder, writing
from torchlms.report_page.finding import findings_of
from torchlms.report_page.page import page
from torchlms.report_page.profiled import Profiled
from torchlms.report_page.run import Run
from torchlms.report_page.step import step_of
from torchlms.report_page.summary import headline
from torchlms.report_page.trace import trace_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchlms.fit.curve import CurvePoint

    Write = Callable[[str], None]

SCHEMA = "torchlms.report/1"


@dataclass(frozen=True, slots=True)
class ReportOrder:
    """What ``torchlms report`` was asked for. Without anything else the page lies beside the run."""

    run: Path
    page: Path | None = None
    trace: Path | None = None
    profile: Path | None = None  # a profiler's, of a step that is shown in both
    curve: bool = True
    as_json: bool = False

    @property
    def page_path(self) -> Path | None:
        """Where the page goes; None if only something else was asked for."""
        if self.page is None and self.trace is None and not self.as_json:
            return self.run.with_suffix(".html")
        return self.page


def report(order: ReportOrder, write: Write) -> dict[str, Any]:
    """Write the page, the trace, or both; what is returned is for JSON. PlanMismatch for a file that is no
    record of a run."""
    check_folder(order.page_path, order.trace)
    for path in filter(None, (order.page_path, order.trace)):
        if path.absolute() in {read.absolute() for read in (order.run, order.profile) if read is not None}:
            raise BadOption(f"{path} is what is to be read: choose another name for what is to be written")
    run = Run.load(order.run)
    profiled = Profiled.load(order.profile) if order.profile is not None else None
    points: tuple[CurvePoint, ...] = ()
    if order.curve and run.plan is not None and (order.page_path is not None or order.as_json):
        write("planning for other budgets, for speed against budget (--no-curve leaves it out)")
        points = curve(run.tape, run.machine, run.plan.budget)
    if order.page_path is not None:
        with writing(order.page_path):
            order.page_path.write_text(page(run, points, profiled), encoding="utf-8")
        write(f"wrote {order.page_path}: open it in a browser")
    if order.trace is not None:
        with writing(order.trace):
            order.trace.write_text(trace_json(run, profiled))
        write(f"wrote {order.trace}: open it in ui.perfetto.dev or chrome://tracing")
    return figures(run, points)


def figures(run: Run, points: Sequence[CurvePoint]) -> dict[str, Any]:
    """What the page says in words and numbers."""
    return {
        "schema": SCHEMA,
        "headline": headline(run, step_of(run)),
        "predicted": to_json(run.plan.predicted) if run.plan is not None else None,
        "stats": run.stats,
        "findings": [asdict(finding) for finding in findings_of(run)],
        "curve": [asdict(point) for point in points],
        "versions": run.versions,
    }
