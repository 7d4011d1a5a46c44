"""Loudness: from which level on the lines that LMS writes are shown. TORCHLMS_LOG says so; else info."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from torchlms.errors import BadOption

VARIABLE = "TORCHLMS_LOG"
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}

log = logging.getLogger("torchlms")


def wanted_level() -> int:
    """The level of TORCHLMS_LOG; a word that is none counts as nothing, and ``say_if_unknown`` says so."""
    return LEVELS.get(os.environ.get(VARIABLE, "").lower(), logging.INFO)


def say_if_unknown() -> None:
    """A warning if TORCHLMS_LOG is a word that is no level."""
    word = os.environ.get(VARIABLE, "")
    if word and word.lower() not in LEVELS:
        log.warning("%s=%s is no level: choose from %s; this is info", VARIABLE, word, ", ".join(LEVELS))


def read_level(name: str) -> int:
    """The level of that name; BadOption if there is none."""
    if name.lower() not in LEVELS:
        raise BadOption(f"--log {name}: choose from {', '.join(LEVELS)}")
    return LEVELS[name.lower()]


def choose(name: str) -> None:
    """Have this process, and those that it starts, show the log from that level on; "" changes nothing."""
    if name:
        read_level(name)
        os.environ[VARIABLE] = name


@contextlib.contextmanager
def softly(name: str) -> Iterator[None]:
    """Meanwhile, the log from the level ``name`` on; else from that of the environment, or warnings."""
    before = os.environ.get(VARIABLE, "")
    choose(name or ("" if before else "warning"))
    try:
        yield
    finally:
        os.environ[VARIABLE] = before


def show_log() -> None:
    """Make the lines visible where the program has not set logging up itself."""
    if log.hasHandlers():
        return
    if wanted_level() == LEVELS["off"]:
        log.addHandler(logging.NullHandler())  # without any, Python itself shows warnings
        return
    speak()
    if log.level == logging.NOTSET:
        log.setLevel(wanted_level())
    say_if_unknown()


class _StandardError(logging.StreamHandler[Any]):
    """Writes to what standard error is at the moment: a live line puts itself in its place."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def speak() -> None:
    """A line on standard error for each."""
    handler = _StandardError()
    handler.setFormatter(logging.Formatter("torchlms: %(message)s"))
    log.addHandler(handler)
