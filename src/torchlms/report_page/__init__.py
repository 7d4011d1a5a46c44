"""Report page: the record of a run, drawn as one HTML page or written as a trace.

>>> torchlms.report_page.save_run(lms, "run.json")  # doctest: +SKIP

and then ``torchlms report run.json -o report.html``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torchlms.api import LMS

__all__ = ["save_run"]


def save_run(lms: LMS, path: str | Path, *, state: str | None = None) -> None:
    """Write what ``lms`` recorded, planned and measured to ``path``: the record of a run that ``torchlms
    report`` reads. ``lms`` may have been left already; ``state`` is then what it was before.

    Raises NotSupported before the first recorded step has ended: there is nothing to write yet.
    """
    from torchlms.report_page.saving import run_of

    run_of(lms, state=state).save(path)
