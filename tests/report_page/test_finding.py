"""What the page says went otherwise than it should have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.report_page.runs import run
from torchlms.report_page.finding import findings_of


@pytest.mark.parametrize(("share", "said"), [(1.5, "data loader"), (0.5, "while they were timed")])
def test_a_step_time_that_is_off_is_explained(share: float, said: str) -> None:
    """A step that is faster than predicted is not explained by a slow data loader."""
    found = run("host")
    assert found.plan is not None
    measured_s = share * found.plan.predicted.step_s
    found = replace(found, stats={**found.stats, "measured_step_s": measured_s})
    by_name = {finding.name: finding for finding in findings_of(found)}
    meaning = by_name["Step time against its prediction"].meaning
    assert said in meaning
    assert ("data loader" in meaning) == (share > 1)
