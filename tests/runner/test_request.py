"""What was asked for, checked before any of the script runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from torchlms.errors import BadOption
from torchlms.runner.request import Request

SCRIPT = sys.executable  # any file


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skip": 2}, "--skip does nothing without --csv"),
        ({"profile_steps": "3"}, "--profile-steps does nothing without --profile"),
        ({"batch_size": 4}, "--batch-size does nothing without --csv or --live"),
        ({"batch_size": -4, "live": True}, "must not be negative"),
        ({"plan": SCRIPT, "no_plan": True}, "--plan and --no-plan: one or the other"),
        ({"csv_path": Path("a"), "json_path": Path("a")}, "a is asked for twice"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadOption, match=said):
        Request(SCRIPT, **options).check()


def test_options_that_go_together() -> None:
    Request(SCRIPT, skip=2, batch_size=4, csv_path=Path("a"), json_path=Path("-")).check()
    Request(SCRIPT, batch_size=4, live=True, save_plan=Path("b")).check()


def test_without_a_plan() -> None:
    assert Request(SCRIPT, no_plan=True).lms_options()["plan"] is False
    assert Request(SCRIPT).lms_options()["plan"] is None
