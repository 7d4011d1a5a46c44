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

# These show results, read options, explain errors or foretell; no figure depends on them.
_NOT_MEASURED = {
    "__init__.py",
    "__main__.py",
    "errors.py",
    "live.py",
    "loudness.py",
    "outlet.py",
    "report.py",
    *(f"bench/{name}.py" for name in ("arguments", "command", "compare", "demo", "output", "table")),
    "bench/provenance.py",
}
# Folders, likewise.
_PRESENTATION = ("cli", "report", "report_page", "sweep", "fit", "runner", "doctor", "integrations", "steps")

# Results that are of one code from beginning to end.
_WHOLE = tuple(
    f"torchlms.{name}/"
    for name in ("bench", "faults", "soak", "sanitizer", "planning", "safety", "slower-copies")
)

# What the plain run and the rivals consist of: nothing that LMS does changes their figures.
RIVAL_PARTS = ("bench",)


def code_files(package: Path = _PACKAGE, parts: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of each source that a figure can depend on, by its name in the package.

    ``parts`` restricts it to some folders of the package.
    """
    found = {}
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        first = name.split("/")[0]
        if name in _NOT_MEASURED or first in _PRESENTATION or (parts and first not in parts):
            continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(sorted(found.items()))


def code_hash(package: Path = _PACKAGE, parts: tuple[str, ...] = ()) -> str:
    """SHA-256 over the names and contents of those sources."""
    digest = hashlib.sha256()
    for name, content in code_files(package, parts).items():
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def adapters_hash(package: Path = _PACKAGE) -> str:
    """SHA-256 over the adapters to trainers, of which no other figure is."""
    digest = hashlib.sha256()
    for path in sorted((package / "integrations").glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
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
    here, rivals = code_hash(), code_hash(parts=RIVAL_PARTS)
    stale = []
    for path in sorted(folder.rglob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError:
            continue
        schema = str(result.get("schema", "")) if isinstance(result, dict) else ""
        if schema.startswith(_WHOLE):
            fresh = result.get("code") == here
        elif schema.startswith("torchlms.result/"):
            fresh = all(run.get("code") == (here if run.get("lms") else rivals) for run in result["entries"])
        elif schema.startswith("torchlms.suites/"):
            fresh = all(suite.get("code") == here for suite in result["suites"].values())
        elif schema.startswith("torchlms.callbacks/"):
            fresh = result.get("code") == adapters_hash()
        else:
            continue
        if not fresh:
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
