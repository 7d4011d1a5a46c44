"""Watch: LMS beside a script, from the moment it has imported torch to its end."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from torchlms.errors import BadOption, LMSError
from torchlms.loudness import say_if_unknown, speak
from torchlms.outlet import Put, into_nothing, last_outlet, writing
from torchlms.runner.importing import after_import

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torchlms.api import LMS
    from torchlms.runner.finder import Finder
    from torchlms.runner.notes import StepNotes
    from torchlms.runner.request import Request

log = logging.getLogger("torchlms")

OURS = ("--budget", "--host-budget", "--disk-budget", "--disk-dir")  # what hardly is meant for the script


class Watch:
    """Begins before the script, and ends after it with what was asked for: report, figures, plan, tape."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._process = os.getpid()
        self._finder: Finder | None = None
        self._notes: StepNotes | None = None
        self._put: Put = into_nothing

    def begin(self) -> None:
        self._put = last_outlet(self._request.json_path)
        _speak(self._request.level())
        if not self._request.log:
            say_if_unknown()
        self._say_what_is_the_scripts_own()
        after_import("torch", self._find)

    def _say_what_is_the_scripts_own(self) -> None:
        for option in OURS:
            given = getattr(self._request, option.removeprefix("--").replace("-", "_")) is not None
            if not given and any(word.partition("=")[0] == option for word in self._request.arguments):
                log.warning(
                    "%s comes after %s and goes to it, not to torchlms, whose options come before",
                    option,
                    "the code" if self._request.as_code else self._request.target,
                )

    def _find(self) -> None:
        if os.getpid() == self._process:  # a fork may be the first to import torch
            from torchlms.runner.finder import Finder
            from torchlms.runner.notes import StepNotes

            self._say_if_there_is_no_such_device()
            self._finder = Finder(self._request.lms_options(), self._request.device)
            self._notes = StepNotes(self._request, self._finder)

    def _say_if_there_is_no_such_device(self) -> None:
        device = self._request.device
        if device is None or device == "cpu":
            return
        import torch

        # Counted by the driver's management library: the script may want to fork before it begins with CUDA.
        count = torch.cuda.device_count()
        if int(device.partition(":")[2] or 0) >= count:
            log.warning("--device %s: torch sees %d CUDA devices, so that LMS will not go on", device, count)

    def end(self, error: BaseException | None = None) -> None:
        """Take LMS off, and say and write what was asked for; never raises. ``error`` ended the script."""
        finder = self._finder
        if finder is None:
            log.warning("the script never imported torch: there was nothing to do")
            return
        state = finder.lms.state if finder.lms is not None else "off"
        try:
            if self._notes is not None:
                self._notes.close()
        except (OSError, RuntimeError) as trouble:  # of files of steps; the profiler's are no OSErrors
            log.error("what was to be noted of the steps could not be written: %s", trouble)
        try:
            finder.end()
        except (LMSError, RuntimeError) as trouble:
            log.warning("%s", trouble)
        if finder.lms is None and not finder.left:
            log.warning(
                "LMS was never on: no forward pass of a module with parameters to train was seen in this "
                "process's main thread%s",
                f" on {self._request.device}" if self._request.device else "",
            )
        ended_by = None if error is None else type(error).__name__
        self._hand_over(finder.lms, {"state": state, "ended_by": ended_by})

    def _hand_over(self, lms: LMS | None, ending: dict[str, Any]) -> None:
        """What was asked for; ``ending`` is how it stood when the script ended, and what ended it."""
        from torchlms.report import report_text
        from torchlms.runner.notes import averages_text

        request = self._request
        counted: dict[str, Any] = {"steps": 0} if lms is None else lms.stats()
        stats = counted | ending
        averages = self._notes.averages() if self._notes is not None else {}
        if averages:
            stats["averages"] = averages
            log.info("after the first %d steps: %s", request.skip, averages_text(averages))
        if request.report:
            known = (lms.tape, lms.plan, None, lms.rules) if lms is not None else (None, None)
            print(report_text(stats, *known, over=True), file=sys.stderr)
        if request.json_path is not None:
            _write(request.json_path, "figures", lambda: self._put(stats))
        if request.save_plan is not None:
            plan, path = lms.plan if lms is not None else None, request.save_plan
            _write(path, "plan", None if plan is None else lambda: plan.save(path))
        if request.save_tape is not None:
            tape, path = lms.tape if lms is not None else None, request.save_tape
            _write(path, "tape", None if tape is None else lambda: tape.save(path))
        if request.save_run is not None:
            from torchlms.report_page import save_run

            path, shown = request.save_run, lms if lms is not None and lms.tape is not None else None
            _write(
                path, "tape", None if shown is None else lambda: save_run(shown, path, state=ending["state"])
            )

    def advice(self, error: BaseException) -> str:
        """What to do after ``error``, if it tells of memory running out; else nothing."""
        if os.getpid() != self._process or not _is_out_of_memory(error):
            return ""
        lms = self._finder.lms if self._finder is not None else None
        if lms is None:
            return (
                "memory ran out before LMS was on, which is at the first forward pass of a module with "
                "parameters to train: what is allocated before that has to fit"
            )
        return (
            f"memory ran out although LMS was on, for {lms.stats()['steps']} steps: parameters, gradients, "
            "optimizer states and the largest single op must fit together. Try a smaller batch, or see "
            "`torchlms fit --help` for the largest that fits"
        )


def _write(path: Path, what: str, write: Callable[[], Any] | None) -> None:
    if write is None:
        log.warning("no %s was made, so that %s is not written", what, path)
        return
    try:
        with writing(path):
            write()
    except BadOption as error:
        log.error("%s", error)


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    signs = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _speak(level: int) -> None:
    """Say what LMS says on standard error, apart from however the script sets its own log up. Errors are
    said whatever the level: they are why the run ends."""
    speak()
    log.propagate = False
    log.setLevel(min(level, logging.ERROR))
