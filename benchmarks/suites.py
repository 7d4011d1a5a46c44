"""Suites: other projects' own tests, forward and backward, under LMS that is forced on.

    python benchmarks/suites.py operators            PyTorch's samples of its operators
    python benchmarks/suites.py modules              PyTorch's samples of its modules
    python benchmarks/suites.py transformers         a small model of each of many architectures
    python benchmarks/suites.py operators --recompute      values are also dropped and made again
    python benchmarks/suites.py operators --only linalg    some groups; written only where --out says
    python benchmarks/suites.py operators --only linalg --amend    ... and put in place of their last result

Each case runs plainly twice and then under LMS: results, gradients, inputs, parameters, buffers and the
generator's state must be the same to the last bit. The cases run in a process of their own. One that dies
or hangs twice is an entry, and a new process goes on after it.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Suite:
    """Where the cases come from, and whether a tight budget is tried beside the rule that moves all."""

    module: str
    tight: bool = False
    timeout_s: float = 120.0  # for one case


SUITES = {
    "operators": Suite("operators"),
    "modules": Suite("modules"),
    # Each is run many times over until a tight budget is found.
    "transformers": Suite("transformers_models", tight=True, timeout_s=600.0),
}


@dataclass(slots=True)
class Progress:
    """What the working processes have told so far, and where the next one begins."""

    groups: int = 0
    group: int = 0
    case: int = 0
    name: str = ""  # of the case that runs, else of the group that is being made
    running: bool = False
    done: bool = False
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)  # what ran when a worker ended

    def take(self, item: dict[str, Any]) -> None:
        """One line of what a worker wrote."""
        self.groups = item.get("groups", self.groups)
        self.done = item.get("done", self.done)
        if "group" in item:
            self.group, self.case, self.name = item["group"], item["first"], item["name"]
        elif "begin" in item:
            self.name, self.running = item["begin"], True
        elif "finding" in item:
            self.findings[self.name] = item["finding"]
            self.running = False
            self.case += 1

    def lost(self, why: str) -> None:
        """The worker ended in the middle. What ran is tried once more, for it may have been ended from
        outside; the second time that is noted, and the next one begins behind it."""
        if self.name not in self.suspects:
            self.suspects.add(self.name)
            self.running = False
            return
        self.findings[self.name] = {"verdict": "ended", "why": why}
        if self.running:
            self.running, self.case = False, self.case + 1
        else:
            self.group, self.case = self.group + 1, 0


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    if asked.worker:
        return _work(asked)
    from borrowed.result import code

    progress = Progress()
    made_by = code(SUITES[asked.suite].module)
    started_s = time.monotonic()
    while not progress.done:
        _run_worker(asked, progress)
    return _conclude(asked, progress, made_by, time.monotonic() - started_s)


def _conclude(asked: argparse.Namespace, progress: Progress, made_by: dict[str, str], seconds: float) -> int:
    """Write what was found, say it, and fail if LMS is to blame for something."""
    from borrowed.result import COLUMNS, FILE, amend, part, save, table
    from borrowed.trial import Finding, Verdict

    from torchlms.bench.table import plain_table

    findings = {
        name: Finding(**{**found, "verdict": Verdict(found["verdict"])})
        for name, found in progress.findings.items()
    }
    name = asked.suite + (", recompute" if asked.recompute else "")
    command = ["python", "benchmarks/suites.py", asked.suite]
    command += ["--only", asked.only] if asked.only else []
    command += ["--most", str(asked.most)] if asked.most else []
    command += ["--recompute"] if asked.recompute else []
    made = part(SUITES[asked.suite].module, shlex.join(command), progress.groups, findings, made_by)
    for line in plain_table(COLUMNS, table({name: made})):
        print(line)
    for other in made["others"]:
        print(f"{other['verdict'].value}: {other['case']}: {other['why']}")
    if asked.amend:
        amend(name, findings, made, asked.out or FILE)
    elif asked.out or not asked.only:
        save(name, made, asked.out or FILE)
    print(f"in {seconds:.0f} s")
    wrong = (Verdict.DIFFERS, Verdict.ENDED, Verdict.REFUSED)
    return 1 if any(finding.verdict in wrong for finding in findings.values()) else 0


# -- the process that watches ----------------------------------------------------------------------


def _run_worker(asked: argparse.Namespace, progress: Progress) -> None:
    """One process, until it is done, dies, or says nothing for too long."""
    with tempfile.TemporaryDirectory(prefix="torchlms-suites-") as folder:
        told, errors = Path(folder) / "told", Path(folder) / "errors"
        told.touch()
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                _command(asked, told, progress), stdout=stderr, stderr=stderr, env=_environment(folder)
            )
            why = _listen(process, told, progress, asked.timeout or SUITES[asked.suite].timeout_s)
        if not progress.done:
            if process.returncode > 0:
                print(errors.read_text(errors="replace"), file=sys.stderr)
                raise SystemExit(f"the process that runs the cases failed in {progress.name or 'its start'}")
            progress.lost(why)


def _listen(process: subprocess.Popen[bytes], told: Path, progress: Progress, timeout_s: float) -> str:
    """Take in what the process tells; why it ended, if it was not done."""
    heard_s = time.monotonic()
    with told.open() as file:
        rest = ""
        while True:
            ended = process.poll() is not None
            text = file.read()
            if text:
                heard_s = time.monotonic()
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    progress.take(json.loads(line))
            if ended:
                return f"killed by signal {-process.returncode}"
            if time.monotonic() - heard_s > timeout_s:
                process.kill()
                process.wait()
                return f"no answer in {timeout_s:.0f} s"
            time.sleep(_POLL_S)


def _command(asked: argparse.Namespace, told: Path, progress: Progress) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), asked.suite, "--worker", str(told)]
    command += ["--group", str(progress.group), "--case", str(progress.case)]
    command += ["--only", asked.only, "--most", str(asked.most)]
    return command + (["--recompute"] if asked.recompute else [])


def _environment(folder: str) -> dict[str, str]:
    """Nothing is fetched, nothing is logged, and what a killed process leaves goes with the folder."""
    return {**os.environ, "TMPDIR": folder, "TORCHLMS_LOG": "off", "HF_HUB_OFFLINE": "1"}


# -- the process that works ------------------------------------------------------------------------


def _work(asked: argparse.Namespace) -> int:
    import torch
    from borrowed.trial import Ways, try_case

    torch.set_num_threads(1)  # with more, plain runs differ among themselves now and then
    warnings.simplefilter("ignore")
    logging.getLogger("torchlms").setLevel(logging.ERROR)
    suite = SUITES[asked.suite]
    ways = Ways(moving=not asked.recompute, tight=suite.tight or asked.recompute, recompute=asked.recompute)
    groups = chosen(asked.suite, asked.only)
    gc.freeze()  # each LMS has Python's collector look over all that was imported, more than once
    with asked.worker.open("a", buffering=1) as file:

        def tell(**item: Any) -> None:
            file.write(json.dumps(item) + "\n")

        tell(groups=len(groups))
        for number, group in enumerate(groups[asked.group :], asked.group):
            first = asked.case if number == asked.group else 0
            tell(group=number, first=first, name=group.name)
            for case in spread(list(group.cases()), asked.most)[first:]:
                tell(begin=case.name)
                tell(finding=asdict(try_case(case, ways)))
        tell(done=True)
    return 0


def spread(cases: list[Any], most: int) -> list[Any]:
    """At most so many of ``cases``, from all over them: the first are often alike, and empty. 0 is all."""
    if not most or len(cases) <= most:
        return cases
    return [cases[number * len(cases) // most] for number in range(most)]


def chosen(suite: str, only: str = "") -> list[Any]:
    """The groups of a suite whose names match a pattern, or contain it."""
    groups = list(importlib.import_module(f"borrowed.{SUITES[suite].module}").groups())
    return [group for group in groups if not only or only in group.name or fnmatch.fnmatch(group.name, only)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--only", default="", help="groups whose names match this pattern, or contain it")
    parser.add_argument(
        "--most", type=int, default=0, help="cases of each group, from all over it; default: all"
    )
    parser.add_argument("--recompute", action="store_true", help="values may be dropped and made again")
    parser.add_argument(
        "--amend", action="store_true", help="judge cases of the file anew that were no success"
    )
    parser.add_argument(
        "--timeout", type=float, default=0.0, help="seconds for one case; default: the suite's"
    )
    parser.add_argument("--out", type=Path, help="the file to write; default: results/suites.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    for name in ("--group", "--case"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
