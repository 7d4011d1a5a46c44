"""Outlet: where figures go as JSON. ``-`` is standard output, which then carries nothing else."""

from __future__ import annotations

import contextlib
import json
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
        yield into_nothing if path is None else lambda figures: _write(figures, path)
        return
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield lambda figures: print(_text(figures), file=out, flush=True)


def into_nothing(figures: Any) -> None:
    """For figures that nobody wants as JSON."""


def check_folder(*paths: Path | None) -> None:
    """BadOption for a file that could not be written in the end because its folder does not exist."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise BadOption(f"{path}: its folder does not exist")


def _write(figures: Any, path: Path) -> None:
    path.write_text(_text(figures) + "\n")


def _text(figures: Any) -> str:
    return json.dumps(figures, indent=1)
