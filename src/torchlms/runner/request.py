"""Request: which script is to run, and within what; checked before any of it runs. Needs no torch."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchlms.errors import BadOption
from torchlms.loudness import read_level, wanted_level
from torchlms.memory.limits import parse_option
from torchlms.outlet import check_folder
from torchlms.rule_text import read_rules
from torchlms.runner.main_module import STDIN

_COMPANIONS = {"profile_steps": ("profile",), "skip": ("csv_path",), "batch_size": ("csv_path", "live")}
_SOME_WHOLE = 1 << 62  # to read a percentage before its whole is known


@dataclass(frozen=True, slots=True)
class Request:
    """``target`` is the path of a script (``-``: standard input is one), with ``as_module`` the dotted name
    of a module, with ``as_code`` the code itself."""

    target: str
    arguments: tuple[str, ...] = ()
    as_module: bool = False
    as_code: bool = False
    budget: str | None = None
    host_budget: str | None = None
    disk_dir: str | None = None
    disk_budget: str | None = None
    plan: str | None = None
    no_plan: bool = False  # values leave only when memory runs out
    recompute: bool = True
    rule: tuple[str, ...] = ()  # each as rule_text reads it
    verify: bool = False
    verify_every: int = 0  # steps; 0: as verify says
    snapshot: bool = False
    device: str | None = None
    save_plan: Path | None = None
    save_tape: Path | None = None
    save_run: Path | None = None
    json_path: Path | None = None
    csv_path: Path | None = None  # a row per step
    skip: int = 5  # steps left out of averages
    batch_size: int = 0  # items in a step; 0: not known
    profile: Path | None = None  # a trace of some steps
    profile_steps: str = "10-12"  # which ones, counted from 0
    live: bool = False
    report: bool = False
    log: str = ""  # least level of what is said; nothing: that of TORCHLMS_LOG
    quiet: bool = False
    whole_tracebacks: bool = False

    def check(self) -> None:
        """BadOption for what would otherwise be found out only after the script has worked for a while."""
        for name in ("budget", "host_budget", "disk_budget"):
            size, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if size is not None:
                parse_option(option, size, whole_bytes=_SOME_WHOLE, or_none=name != "budget")
        read_rules(self.rule)
        if self.verify_every < 0:
            raise BadOption(f"--verify-every {self.verify_every}: a number of steps")
        if self.as_module and self.as_code:
            raise BadOption("-m and -c: a module or code, not both")
        named = self.as_module or self.as_code or self.target == STDIN
        if not named and not Path(self.target).exists():
            raise BadOption(
                f"there is no script {self.target!r}; for a module write: torchlms run -m {self._module()}"
            )
        if self.plan is not None and not Path(self.plan).is_file():
            raise BadOption(f"--plan {self.plan}: there is no such file")
        if self.plan is not None and self.no_plan:
            raise BadOption("--plan and --no-plan: one or the other")
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise BadOption(f"cannot read --device {self.device!r}: write 'cuda', 'cuda:1' or 'cpu'")
        if self.skip < 0 or self.batch_size < 0:
            raise BadOption("--skip and --batch-size must not be negative")
        self._check_companions()
        _ = self.profiled, self.level()
        check_folder(
            self.save_plan, self.save_tape, self.save_run, self.json_path, self.csv_path, self.profile
        )

    def _check_companions(self) -> None:
        """Options that say something of another one, which is not there."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, companions in _COMPANIONS.items():
            alone = not any(getattr(self, other) for other in companions)
            if alone and getattr(self, name) != defaults[name]:
                others = " or ".join(f"--{other.removesuffix('_path')}" for other in companions)
                raise BadOption(f"--{name.replace('_', '-')} does nothing without {others}")

    def _module(self) -> str:
        """A dotted name that leads to a file is meant as a module."""
        path = Path(*self.target.split(".")).with_suffix(".py")
        return self.target if "." in self.target and path.is_file() else "name"

    @property
    def profiled(self) -> tuple[int, int]:
        """The first and the last step of the profile."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.profile_steps)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise BadOption(f"--profile-steps {self.profile_steps}: write 10-12, or 10 for one step")
        return first, last

    def level(self) -> int:
        """From which on LMS's lines are shown."""
        if self.quiet:
            return logging.ERROR
        return read_level(self.log) if self.log else wanted_level()

    def lms_options(self) -> dict[str, Any]:
        """The keywords of ``LMS``. The device is that of the model, found when it is called."""
        return {
            "budget": self.budget,
            "host_budget": self.host_budget,
            "disk_dir": self.disk_dir,
            "disk_budget": self.disk_budget,
            "plan": False if self.no_plan else self.plan,
            "rules": read_rules(self.rule, recompute=self.recompute),
            "verify": self.verify_every or self.verify,
            "snapshot": self.snapshot,
        }
