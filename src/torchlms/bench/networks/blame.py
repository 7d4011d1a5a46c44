"""Blame: what a user's own code raised, in one line, with the place in it."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from torchlms.errors import BadOption, LMSError

_PACKAGE = str(Path(__file__).resolve().parent.parent.parent)
_LIBRARIES = (_PACKAGE, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


@contextmanager
def blamed(say: Callable[[str], str]) -> Iterator[None]:
    """What a user's own code raises in here is a BadOption in the words of ``say``, which is told what that
    was. Running out of memory, and what this package says on purpose, is none of the user's."""
    try:
        yield
    except (torch.OutOfMemoryError, LMSError):
        raise
    except Exception as error:
        raise BadOption(say(_told(error))) from error


def _told(error: BaseException) -> str:
    """Kind and first line of ``error``, and the innermost line of code that no library holds."""
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".removesuffix(": ")
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*_LIBRARIES, "<"))
    ]
    return f"{said} ({Path(theirs[-1].filename).name}:{theirs[-1].lineno})" if theirs else said
