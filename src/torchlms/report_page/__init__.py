"""Report page: one run as a page to look at, and as a trace."""

from torchlms.report_page.record import RunRecord, save_run

__all__ = ["RunRecord", "save_run"]
