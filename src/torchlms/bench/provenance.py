"""Provenance: which code, machine and command a result came from, and which results are out of date.

    python -m torchlms.bench.provenance benchmarks/results

lists the result files made by other sources than these, and exits with 1 if there are any.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent

# These show results or read options; no figure depends on them.
_NOT_MEASURED = ("report", "cli.py", "__main__.py")


def code_hash(package: Path = _PACKAGE) -> str:
    """SHA-256 over the names and contents of the package's sources, presentation left out."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        relative = path.relative_to(package)
        if relative.parts[0] in _NOT_MEASURED:
            continue
        data = path.read_bytes()
        digest.update(f"{relative.as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def host_facts() -> dict[str, Any]:
    """CPUs this process may use, and the machine's memory."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity is not None else os.cpu_count()
    return {"cpus": cpus, "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def now() -> str:
    """The date, ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command_line(argv: list[str] | None = None) -> str:
    """The command as one would type it, whatever started this interpreter."""
    return shlex.join(["torchlms", *(sys.argv[1:] if argv is None else argv)])


def stale_results(folder: Path) -> list[Path]:
    """The benchmark results below ``folder`` whose code is not this code."""
    here = code_hash()
    stale = []
    for path in sorted(folder.rglob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError:
            continue
        if not isinstance(result, dict) or not str(result.get("schema", "")).startswith("torchlms.bench/"):
            continue
        if result.get("code") != here:
            stale.append(path)
    return stale


def main(folders: list[str]) -> int:
    """List stale files; 1 if there are any."""
    stale = [path for folder in folders or ["benchmarks/results"] for path in stale_results(Path(folder))]
    for path in stale:
        print(path)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
