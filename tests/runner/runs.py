"""A program run twice, in processes of its own: by python, and by ``torchlms run``."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples" / "scripts"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TORCHLMS_LOG": ""}


@dataclass(frozen=True)
class Ended:
    status: int  # negative: the signal that ended it
    out: str
    err: str


def plainly(*arguments: str, cwd: Path, stdin: str = "") -> Ended:
    return _run([sys.executable, *arguments], cwd, stdin)


def under_lms(*arguments: str, cwd: Path, stdin: str = "") -> Ended:
    return _run([sys.executable, "-m", "torchlms", "run", *arguments], cwd, stdin)


def both(*arguments: str, cwd: Path, stdin: str = "") -> tuple[Ended, Ended]:
    """Plainly, and with LMS saying nothing."""
    return plainly(*arguments, cwd=cwd, stdin=stdin), under_lms("--quiet", *arguments, cwd=cwd, stdin=stdin)


def _run(command: list[str], cwd: Path, stdin: str) -> Ended:
    done = subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=200, env=ENVIRONMENT
    )
    return Ended(done.returncode, done.stdout, done.stderr)
