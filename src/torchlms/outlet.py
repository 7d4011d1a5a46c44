"""Outlet: where figures go as JSON. ``-`` is standard output, which then carries nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchlms.errors import BadOption

STDOUT = Path("-")

Put = Callable[[Any], None]


@contextmanager
def outlet(path: Path | None) -> Iterator[Put]:
    """A function that writes figures to ``path``, if there is one; BadOption if its folder is not there.

    As long as this is open with ``-``, whatever else is printed goes to standard error.
    """
    check_folder(path)
    if path != STDOUT:
        yield _into(path)
        return
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield lambda figures: print(_text(figures), file=out, flush=True)


def last_outlet(path: Path | None) -> Put:
    """As ``outlet``, to the end of this process and of those that it starts."""
    if path != STDOUT:
        return _into(path)
    sys.stdout.flush()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return lambda figures: print(_text(figures), file=out, flush=True)


def into_nothing(figures: Any) -> None:
    """For figures that nobody wants as JSON."""


def check_folder(*paths: Path | None) -> None:
    """BadOption for a file that could not be written in the end: its folder does not exist or takes no files,
    it is one, or another of ``paths`` is the same."""
    seen = set()
    for path in paths:
        if path is None or path == STDOUT:
            continue
        if path.absolute() in seen:
            raise BadOption(f"{path} is asked for twice: each needs a file of its own")
        seen.add(path.absolute())
        folder = path.absolute().parent
        if not folder.is_dir():
            raise BadOption(f"{path}: its folder does not exist")
        if path.is_dir():
            raise BadOption(f"{path} is a folder: name a file")
        if not os.access(folder, os.W_OK):
            raise BadOption(f"{path}: no permission to write into its folder")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While ``path`` is written: BadOption that names it where that fails, a full disk above all."""
    try:
        yield
    except OSError as error:
        raise BadOption(f"{path} could not be written: {error.strerror or error}") from error


def _into(path: Path | None) -> Put:
    if path is None:
        return into_nothing

    def write(figures: Any) -> None:
        with writing(path):
            path.write_text(_text(figures) + "\n")

    return write


def _text(figures: Any) -> str:
    return json.dumps(figures, indent=1)
