"""The end of a watched script: what goes wrong then is said, and takes nothing else with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchlms.errors import SpillError
from torchlms.outlet import last_outlet
from torchlms.runner.request import Request
from torchlms.runner.watch import Watch


class Failing:
    """A finder whose LMS fails as it is taken off, and notes whose file cannot be closed."""

    lms = None
    left = True

    def end(self) -> None:
        raise SpillError("the spill file is gone")

    def close(self) -> None:
        raise OSError("No space left on device")

    def averages(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("error", [None, KeyError("of the script")])
def test_figures_are_written_all_the_same(
    error: BaseException | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "figures.json"
    watch = Watch(Request("train.py", json_path=path))
    failing: Any = Failing()
    watch._finder, watch._notes, watch._put = failing, failing, last_outlet(path)
    watch.end(error)
    assert json.loads(path.read_text())["ended_by"] == (None if error is None else "KeyError")
    assert "the spill file is gone" in caplog.text
    assert "could not be written: No space left on device" in caplog.text
