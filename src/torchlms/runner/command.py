"""Command: ``torchlms run``. The script decides how this ends; what LMS has to say goes to standard error.

Nothing is imported here that the script might want to import under settings of its own.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torchlms.errors import BadOption
from torchlms.runner import main_module
from torchlms.runner.frames import without_our_frames
from torchlms.runner.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.runner.request import Request

    Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def run(request: Request) -> int:
    """Run the script: 0, or 2 if it cannot be begun; what it raises comes out, to end the interpreter."""
    process = os.getpid()
    watch = Watch(request)
    try:
        request.check()
        watch.begin()
        main = main_module.load(
            request.target, request.arguments, as_module=request.as_module, as_code=request.as_code
        )
    except BadOption as error:
        print(f"torchlms: {error}", file=sys.stderr)
        return 2
    except BaseException:
        sys.excepthook = _as_alone(sys.excepthook, request, lambda error: "")
        raise
    try:
        main.execute()
    except BaseException as error:
        if os.getpid() == process:
            watch.end(error)
        if not isinstance(error, SystemExit):
            sys.excepthook = _as_alone(sys.excepthook, request, watch.advice)
        raise
    if os.getpid() == process:  # else a fork of the script has come this far
        watch.end()
    return 0


def _as_alone(show: Hook, request: Request, advice: Callable[[BaseException], str]) -> Hook:
    """``show``, which may be the script's own, given the traceback that the script has when run alone."""

    def shown(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        sys.excepthook = show
        show(kind, error, traceback if request.whole_tracebacks else without_our_frames(error))
        if line := advice(error):
            print(f"torchlms: {line}", file=sys.stderr)

    return shown
