"""Result: what is kept of a suite, whether it is out of date, and the table made of it."""

from __future__ import annotations

import collections
import hashlib
import json
import re
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from borrowed.passes import STEPS
from borrowed.trial import Finding, Verdict
from torchlms.bench import provenance

SCHEMA = "torchlms.suites/1"
FILE = Path(__file__).resolve().parent.parent / "results" / "suites.json"
PLAIN_SUCCESSES = (Verdict.SAME, Verdict.SAME_ERROR)

_HERE = Path(__file__).resolve().parent
_SHARED = ("case", "force", "passes", "trial")  # what every suite is run by
_NOTHING = "*No results yet.*"

Findings = dict[str, Finding]  # by the name of the case


def driver_hash(module: str) -> str:
    """SHA-256 of the sources here that a suite depends on."""
    files = [_HERE / f"{name}.py" for name in (*_SHARED, module)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def code(module: str) -> dict[str, str]:
    """The code as it is now, to be noted before a suite runs."""
    return {"code": provenance.code_hash(), "driver": driver_hash(module)}


def part(
    module: str, command: str, groups: int, findings: Findings, made_by: dict[str, str]
) -> dict[str, Any]:
    """What is written of one suite: counts, and each case that is not a plain success, with the reason."""
    counts = collections.Counter(finding.verdict for finding in findings.values())
    others = [
        {"case": name, **asdict(finding)}
        for name, finding in findings.items()
        if finding.verdict not in PLAIN_SUCCESSES
    ]
    return {
        "command": command,
        "date": provenance.now(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers") if module.startswith("transformers") else None,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "steps": STEPS,
        "module": module,
        "groups": groups,
        "cases": len(findings),
        "moved": sum(finding.away > 0 for finding in findings.values()),
        "planned": sum(finding.planned > 0 for finding in findings.values()),
        "counts": {verdict.value: counts[verdict] for verdict in Verdict},
        "others": others,
        **made_by,
    }


def load(path: Path = FILE) -> dict[str, dict[str, Any]]:
    """The suites in ``path`` by name; none if there is no such file."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    fits = isinstance(result, dict) and result.get("schema") == SCHEMA
    return dict(result["suites"]) if fits else {}


def save(name: str, made: dict[str, Any], path: Path = FILE) -> None:
    """Put one suite in place of its last result; the others stay."""
    suites = dict(sorted({**load(path), name: made}.items()))
    text = json.dumps({"schema": SCHEMA, "suites": suites}, indent=1)
    short = re.sub(r"{[^{}]*}", lambda found: re.sub(r"\n\s*", " ", found[0]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(short + "\n")
    beside.replace(path)


def amend(name: str, findings: Findings, made: dict[str, Any], path: Path = FILE) -> None:
    """Put new findings in place of those in ``path`` that were no plain success, and note by what they were
    made. All else stays, and with it the code that the suite is said to depend on."""
    old = load(path)[name]
    before = {other["case"]: other for other in old["others"]}
    anew = {case: finding for case, finding in findings.items() if case in before}
    for case, finding in anew.items():
        old["counts"][before[case]["verdict"]] -= 1
        old["counts"][finding.verdict.value] += 1
        for total, figure in (("moved", "away"), ("planned", "planned")):
            old[total] += (getattr(finding, figure) > 0) - (before[case][figure] > 0)
        before[case] = {"case": case, **asdict(finding)}
    old["others"] = [other for other in before.values() if Verdict(other["verdict"]) not in PLAIN_SUCCESSES]
    note = {key: made[key] for key in ("command", "date", "torch", "code", "driver")}
    old["amended"] = [*old.get("amended", []), {**note, "cases": list(anew)}]
    save(name, old, path)


def why_stale(made: dict[str, Any]) -> str:
    """What has changed since; empty if nothing that the suite depends on."""
    now = code(made["module"])
    changed = ["the package"] if made["code"] != now["code"] else []
    if made["driver"] != now["driver"]:
        changed.append("benchmarks/borrowed/")
    return " and ".join(changed) + " changed" if changed else ""


# -- in words --------------------------------------------------------------------------------------


def table(suites: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each suite: how much was run, and what came of it."""
    return [
        (
            name,
            f"{made['groups']}",
            f"{made['cases']}",
            f"{made['moved']}",
            *(f"{made['counts'][verdict.value]}" for verdict in reversed(Verdict)),
        )
        for name, made in suites.items()
    ]


COLUMNS = ("suite", "groups", "cases", "with values that left", *(v.value for v in reversed(Verdict)))


def markdown(suites: dict[str, dict[str, Any]]) -> str:
    """The table, and below it what is not a plain success, gathered by group."""
    if not suites:
        return _NOTHING
    lines = ["| " + " | ".join(row) + " |" for row in (COLUMNS, *table(suites))]
    lines.insert(1, "|" + " --- |" * len(COLUMNS))
    for name, made in suites.items():
        versions = f"torch {made['torch']}"
        if made["transformers"]:
            versions += f", transformers {made['transformers']}"
        anew = "".join(
            f", {len(one['cases'])} judged anew {one['date'][:10]}" for one in made.get("amended", [])
        )
        lines += ["", f"**{name}** ({versions}, {made['date'][:10]}{anew}):"]
        lines += [f"- {line}" for line in _gathered(made["others"])] or ["- nothing but plain successes"]
    return "\n".join(lines)


def _gathered(others: list[dict[str, Any]]) -> list[str]:
    """Cases of one group and one verdict share a line, with the reason of the first."""
    gathered: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for other in others:
        group = other["case"].partition(" #")[0]
        gathered.setdefault((other["verdict"], group), []).append(other)
    return [
        f"{verdict}: `{group}`, {len(cases)} {'case' if len(cases) == 1 else 'cases'} ({cases[0]['why']})"
        for (verdict, group), cases in sorted(gathered.items())
    ]
