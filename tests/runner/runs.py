"""A program run twice: by python, and by ``torchlms run``, in processes of its own or in forks of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import forked
from tests.forked import Ended

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples" / "scripts"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TORCHLMS_LOG": ""}


def plainly(*arguments: str, cwd: Path, stdin: str = "") -> Ended:
    return _run([sys.executable, *arguments], cwd, stdin)


def under_lms(*arguments: str, cwd: Path, stdin: str = "") -> Ended:
    return _run([sys.executable, "-m", "torchlms", "run", *arguments], cwd, stdin)


def both(*arguments: str, cwd: Path, stdin: str = "") -> tuple[Ended, Ended]:
    """Plainly, and with LMS saying nothing."""
    return plainly(*arguments, cwd=cwd, stdin=stdin), under_lms("--quiet", *arguments, cwd=cwd, stdin=stdin)


def forked_plainly(*arguments: str, cwd: Path, stdin: str = "") -> Ended:
    """For scripts of which nobody asks how they begin: see ``forked.py``."""
    return forked.run(*arguments, cwd=cwd, environment=ENVIRONMENT, stdin=stdin)


def forked_under_lms(*arguments: str, cwd: Path, stdin: str = "") -> Ended:
    return forked.run("torchlms", "run", *arguments, cwd=cwd, environment=ENVIRONMENT, stdin=stdin)


def forked_both(*arguments: str, cwd: Path, stdin: str = "") -> tuple[Ended, Ended]:
    plain = forked_plainly(*arguments, cwd=cwd, stdin=stdin)
    return plain, forked_under_lms("--quiet", *arguments, cwd=cwd, stdin=stdin)


def _run(command: list[str], cwd: Path, stdin: str) -> Ended:
    done = subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=200, env=ENVIRONMENT
    )
    return Ended(done.returncode, done.stdout, done.stderr)
