"""Command: ``torchlms report`` without the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchlms.errors import BadOption
from torchlms.fit.curve import curve
from torchlms.report_page.page import page
from torchlms.report_page.run import Run
from torchlms.report_page.trace import trace_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.fit.curve import CurvePoint

    Write = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ReportOrder:
    """What ``torchlms report`` was asked for. Without ``page`` and ``trace`` the page lies beside the run."""

    run: Path
    page: Path | None = None
    trace: Path | None = None
    curve: bool = True

    @property
    def page_path(self) -> Path | None:
        """Where the page goes; None if only a trace was asked for."""
        if self.page is None and self.trace is None:
            return self.run.with_suffix(".html")
        return self.page


def report(order: ReportOrder, write: Write) -> None:
    """Write the page, the trace, or both. PlanMismatch for a file that is no record of a run."""
    for path in filter(None, (order.page_path, order.trace)):
        if not path.absolute().parent.is_dir():
            raise BadOption(f"{path}: its folder does not exist")
        if path.absolute() == order.run.absolute():
            raise BadOption(f"{path} is the record itself: choose another name")
    run = Run.load(order.run)
    if order.page_path is not None:
        points: tuple[CurvePoint, ...] = ()
        if order.curve and run.plan is not None:
            write("planning for other budgets, to draw speed against budget (--no-curve leaves it out)")
            points = curve(run.tape, run.machine, run.plan.budget)
        order.page_path.write_text(page(run, points), encoding="utf-8")
        write(f"wrote {order.page_path}: open it in a browser")
    if order.trace is not None:
        order.trace.write_text(trace_json(run))
        write(f"wrote {order.trace}: open it in ui.perfetto.dev or chrome://tracing")
