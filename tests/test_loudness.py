"""TORCHLMS_LOG: each level shows what is at least as grave, in a program that has set nothing up itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import forked
from torchlms import loudness

LEVELS = ["debug", "info", "warning", "error"]
PROGRAM = """
import logging, torch, torchlms
logger = logging.getLogger("torchlms")
with torchlms.LMS(torch.nn.Linear(2, 2), budget="1GiB"):
    for level in ("debug", "info", "warning", "error"):
        getattr(logger, level)("%s it is", level)
"""


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [(level, LEVELS[number:]) for number, level in enumerate(LEVELS)]
    + [("off", []), ("", LEVELS[1:]), ("INFO", LEVELS[1:]), ("nonsense", LEVELS[1:])],
)
def test_each_level(wanted: str, shown: list[str], tmp_path: Path) -> None:
    done = forked.run("-c", PROGRAM, cwd=tmp_path, environment=os.environ | {"TORCHLMS_LOG": wanted})
    assert done.status == 0, done.err
    assert [line.split()[1] for line in done.err.splitlines() if line.endswith(" it is")] == shown
    told = [line for line in done.err.splitlines() if "is no level" in line]
    choices = "debug, info, warning, error, off"
    line = f"torchlms: TORCHLMS_LOG=nonsense is no level: choose from {choices}; this is info"
    assert told == ([line] if wanted == "nonsense" else [])


@pytest.mark.parametrize(
    ("asked", "environment", "heard"),
    [("", "", "warning"), ("", "debug", "debug"), ("info", "debug", "info")],
)
def test_softly(asked: str, environment: str, heard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a verb says of its own accord is not so loud as what a program asked for."""
    monkeypatch.setenv(loudness.VARIABLE, environment)
    with loudness.softly(asked):
        assert loudness.wanted_level() == loudness.LEVELS[heard]
    assert os.environ[loudness.VARIABLE] == environment
