"""A script that runs out of memory, unchanged, under ``torchlms run``: it ends, with the same losses.

The memory is the process's own, under a limit that the kernel keeps (RLIMIT_DATA: what a process maps for
itself to write to). A plain run without a limit says what the script needs; less than that is then allowed to
both. Nothing here trusts LMS's own account of memory. examples/scripts/digits.py is not tried: most of what
its few layers need is one convolution with its own workspace, which no ledger sees.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import forked
from tests.forked import Ended
from tests.runner.runs import ENVIRONMENT, EXAMPLES

pytest.importorskip("typer")

MIB = 1 << 20
# Freed blocks go back to the system at once, so that what a process maps is what it uses.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(MIB), "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Case:
    """``less_mib``: how much less than it needs the script gets. About as much less takes it under LMS."""

    script: str
    arguments: str
    budget: str
    less_mib: int


CASES = {
    "a small language model": Case(
        "language_model.py",
        "--steps 2 --batch-size 32 --length 128 --width 64 --layers 6 --accumulate 1", "80MiB", 100,
    ),
    "language_model": Case(
        "language_model.py",
        "--steps 2 --batch-size 64 --length 128 --width 128 --layers 8 --accumulate 1", "260MiB", 400,
    ),
    "regression": Case(
        "regression.py", "--rows 4096 --batch-size 2048 --epochs 1 --width 256 --blocks 16", "120MiB", 100
    ),
    "images": Case("images.py", "--workers 0 --images 64 --batch-size 32 --size 128", "230MiB", 100),
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process maps is read from /proc")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("a small language model", marks=pytest.mark.slow),
        pytest.param("language_model", marks=pytest.mark.slow),
        pytest.param("regression", marks=pytest.mark.more),
        pytest.param("images", marks=pytest.mark.slow),
    ],
)
def test_it_ends_under_lms_where_it_died(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    probed = forked.run("torchlms", "probe", cwd=tmp_path, environment=ENVIRONMENT)
    assert probed.status == 0, probed.err  # under the limit the disk could not be measured
    script = [str(EXAMPLES / case.script), *case.arguments.split()]
    ample, needed_bytes = run([sys.executable, *script], tmp_path)
    assert ample.status == 0, ample.err
    limit_bytes = needed_bytes - case.less_mib * MIB

    plain, _ = run([sys.executable, *script], tmp_path, limit_bytes)
    assert plain.status == 1
    assert "can't allocate memory" in plain.err or "MemoryError" in plain.err, plain.err

    under = [sys.executable, "-m", "torchlms", "run", f"--budget={case.budget}"]
    ours, _ = run([*under, *script], tmp_path, limit_bytes)
    assert (ours.status, ours.out) == (0, ample.out), ours.err


def run(command: list[str], cwd: Path, limit_bytes: int | None = None) -> tuple[Ended, int]:
    """How it ended, and the most bytes that it was seen to have mapped."""

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    out, err = cwd / "out", cwd / "err"
    with out.open("w") as to, err.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=cwd, env=ENVIRONMENT | ALLOCATOR, stdout=to, stderr=errors, preexec_fn=limit
        )
        most_bytes = 0
        while process.poll() is None:
            most_bytes = max(most_bytes, mapped_bytes(process.pid))
            time.sleep(0.01)
    return Ended(process.returncode, out.read_text(), err.read_text()), most_bytes


def mapped_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData")), 0)
