"""Run: measure rows of the benchmark, list those out of date, write the tables.

    python benchmarks/run.py resnet50-b200          measure a row (or all whose names begin so)
    python benchmarks/run.py --rows                 what there is
    python benchmarks/run.py --stale                results made by other code; exit 1 if there are any
    python benchmarks/run.py --table                write the tables of the READMEs from the results

Each job runs in a process of its own. A row's file is written anew after each entry, so that what was
measured stays when something fails later.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from borrowed import result as suites
from facts import without_paths
from result_file import CUT_SHORT, Code, load, load_all, load_current, merged, save, why_stale
from rows import ROWS, Row, find, tiny
from tables import targets_lines, text_table, write_tables
from worker import Job, all_jobs, grow_host, main_jobs, rival_jobs, work

from torchlms.bench import provenance
from torchlms.memory.limits import parse_bytes

_GROW = "grow-host"
_LAST_LINES = 12
_POLL_S = 0.2
_LEAST_S = 20.0  # no job is begun with less time than this
_LEAST_TIMEOUT_S = 180.0
_TIMES_AS_LONG = 3  # as a row's main part takes as a rule, and something has gone wrong
# save_on_cpu pins each tensor anew in its first step. Like this it is a minute faster to start with,
# and its later steps, which are the ones timed, are the same.
_RIVAL_ENVIRONMENT = {
    "save_on_cpu": {
        "PYTORCH_CUDA_ALLOC_CONF": "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
    }
}
_RIVAL_ENVIRONMENT["checkpoint_offload"] = _RIVAL_ENVIRONMENT["save_on_cpu"]


@dataclass(slots=True)
class Sitting:
    """One call: where results go, and how much time there is."""

    folder: Path
    timeout_s: float  # of one process; 0: by what its row takes as a rule
    ends_s: float
    tiny: bool = False
    bundle: Path | None = None
    verbose: bool = False
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def time_for(self, row: Row) -> float:
        """Seconds that the next job, of ``row``, may take; 0 if it should not begin."""
        left_s = self.ends_s - time.monotonic()
        usual_s = max(_LEAST_TIMEOUT_S, _TIMES_AS_LONG * row.seconds)
        return 0.0 if left_s < _LEAST_S else min(self.timeout_s or usual_s, left_s)


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    if asked.worker == _GROW:
        grow_host(parse_bytes(asked.grow_host))
        return 0
    if asked.worker:
        return _work(asked)
    if asked.rows:
        _list_rows()
        return 0
    if asked.stale:
        return _list_stale(asked.out)
    if asked.unpack:
        _unpack(asked.unpack, asked.out)
    if asked.table:
        write_tables(asked.out)
    if asked.unpack or asked.table:
        return 0
    return _measure(asked)


def _measure(asked: argparse.Namespace) -> int:
    rows = find(asked.row) if asked.row else _rows_for_this_machine()
    if asked.tiny:
        rows = [tiny(row) for row in rows]
    sitting = Sitting(
        folder=asked.out,
        timeout_s=asked.timeout,
        ends_s=time.monotonic() + (asked.within or 1e9),
        tiny=asked.tiny,
        bundle=asked.bundle,
        verbose=asked.verbose,
    )
    jobs = []
    if asked.entries in ("all", "main"):
        jobs += [job for row in rows for job in main_jobs(row)]
    if asked.entries in ("all", "rivals"):
        jobs += [job for row in rows for job in rival_jobs(row)]
    if asked.only:
        jobs = [job for job in jobs if job.name in asked.only.split(",")]
    if asked.grow_host:
        subprocess.run([sys.executable, __file__, "--worker", _GROW, "--grow-host", asked.grow_host])
    for job in jobs:
        _do(job, sitting)
    for line in [*text_table(sitting.results), "", *targets_lines(sitting.results)]:
        print(line)
    failed = [
        name for name, result in sitting.results.items() if any("error" in e for e in result["entries"])
    ]
    print(f"results in {os.path.relpath(sitting.folder)}" + (f"; with errors: {failed}" if failed else ""))
    return 0


def _do(job: Job, sitting: Sitting) -> None:
    """Run one job and put what it gives into its row's file, while it runs and at its end."""
    timeout_s = sitting.time_for(job.row)
    if not timeout_s:
        print(f"{job.row.name} {job.name}: left out, the time is up", flush=True)
        return
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torchlms-benchmark-") as folder:
        intake = Intake(job, Path(folder) / "found", sitting)
        errors = Path(folder) / "errors"
        environment = dict(os.environ)
        if job.row.cuda:
            environment |= _RIVAL_ENVIRONMENT.get(job.name, {})
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                _command(job, intake.path, sitting),
                env=environment,
                stderr=None if sitting.verbose else stderr,
            )
            why = _wait(process, timeout_s, intake.look)
        if not why and process.returncode:
            why = _last_words(process.returncode, errors)
            lines = errors.read_text(errors="replace").splitlines()
            print("\n".join(f"    {line}" for line in lines[-_LAST_LINES:]), flush=True)
        intake.close(why)
    why = intake.error or why or "done"
    print(f"{job.row.name} {job.name}: {why} in {time.monotonic() - started_s:.0f} s", flush=True)


class Intake:
    """What the worker of one job has written, brought into the row's file entry by entry."""

    def __init__(self, job: Job, path: Path, sitting: Sitting) -> None:
        self.job = job
        self.path = path
        self.sitting = sitting
        self.error = ""
        self._code = Code.now(job.row)  # before the worker reads it
        self._facts: dict[str, Any] = {}
        self._flags: dict[str, Any] = {}
        self._ways: set[str] = set()
        self._read = 0
        path.touch()

    def look(self) -> None:
        """Take in the lines that are new and whole."""
        lines = self.path.read_text().splitlines(keepends=True)[self._read :]
        for line in lines:
            if not line.endswith("\n"):
                break
            self._read += 1
            item = json.loads(line)
            self._facts = item.get("facts", self._facts)
            self._flags = item.get("flags", self._flags)
            self.error = item.get("error", self.error)
            if "entry" in item:
                self._add(item["entry"])

    def close(self, why: str) -> None:
        """Entries that were expected and did not come say why."""
        self.look()
        self.error = without_paths(self.error or why)
        if self.error:
            for way in self.job.ways:
                if way not in self._ways:
                    self._add({"way": way, "lms": way.startswith("lms"), "error": self.error})

    def _add(self, entry: dict[str, Any]) -> None:
        self._ways.add(entry["way"])
        if not self._facts:
            return  # it died before it could say where it is: nothing was measured
        row, sitting = self.job.row, self.sitting
        path = sitting.folder / f"{row.name}.json"
        old = sitting.results.get(row.name) or load_current(row, path)
        result = merged(row, old, self._facts, self._flags, self._code.stamp(entry))
        sitting.results[row.name] = result
        save(result, path)
        if sitting.bundle is not None:
            save(sitting.results, sitting.bundle)


def _command(job: Job, found: Path, sitting: Sitting) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), job.row.name, "--worker", job.name]
    command += ["--to", str(found)] + (["--tiny"] if sitting.tiny else [])
    plain = _entry(sitting, job.row, "none")
    if job.rival is not None and plain is not None and plain.get("batch_size"):
        command += ["--batch", str(plain["batch_size"])]
    ours = _entry(sitting, job.row, "lms")
    if job.rival is not None and ours is not None and ours.get("budget_bytes"):
        command += ["--cap-bytes", str(ours["budget_bytes"])]
    return command


def _entry(sitting: Sitting, row: Row, way: str) -> dict[str, Any] | None:
    result = sitting.results.get(row.name) or load(sitting.folder / f"{row.name}.json") or {"entries": []}
    return next((entry for entry in result["entries"] if entry["way"] == way), None)


def _wait(process: subprocess.Popen[bytes], timeout_s: float, look: Any) -> str:
    """Until the process ends; it is ended when its time is up. Says why, empty if it ended itself."""
    ends_s = time.monotonic() + timeout_s
    try:
        while process.poll() is None:
            if time.monotonic() > ends_s:
                process.kill()
                process.wait()
                return f"{CUT_SHORT} {timeout_s:.0f} s"
            time.sleep(_POLL_S)
            look()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return ""


def _last_words(code: int, errors: Path) -> str:
    if code < 0:
        return f"killed by signal {-code}" + (" (out of host memory?)" if code == -9 else "")
    lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {code}"


def _work(asked: argparse.Namespace) -> int:
    row = tiny(ROWS[asked.row[0]]) if asked.tiny else ROWS[asked.row[0]]
    job = next(job for job in all_jobs(row) if job.name == asked.worker)
    return work(job, asked.to, batch_size=asked.batch, cap_bytes=asked.cap_bytes)


def _rows_for_this_machine() -> list[Row]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [row for row in ROWS.values() if row.options.device == device]


def _list_rows() -> None:
    for row in ROWS.values():
        rivals = ", ".join(rival.way.value for rival in row.rivals) or "no rivals"
        print(f"{row.name:22} {row.options.device:5} about {row.seconds:3} s, {rivals}")
        print(f"{'':22} {row.proves}")


def _list_stale(folder: Path) -> int:
    rows = load_all(folder)
    stale = {name: why for name, result in rows.items() if (why := why_stale(name, result))}
    for name, made in suites.load(folder / suites.FILE.name).items():
        if why := suites.why_stale(made):
            stale[f"suites, {name}"] = why
    for path in provenance.stale_results(folder):  # those that are no rows: long runs, rows on busy hosts
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name not in rows and path.name != suites.FILE.name:
            stale[name] = "the package has changed"
    for name, why in stale.items():
        print(f"{name}: {why}")
    return 1 if stale else 0


def _unpack(bundle: Path, folder: Path) -> None:
    for name, result in json.loads(bundle.read_text()).items():
        save(result, folder / f"{name}.json")
        print(f"{name}: {len(result['entries'])} entries")


def _parser() -> argparse.ArgumentParser:
    default = Path(__file__).resolve().parent / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("row", nargs="*", help="names, their beginnings, or all; default: this machine's")
    parser.add_argument("--rows", action="store_true", help="list the rows")
    parser.add_argument("--stale", action="store_true", help="list results made by other code")
    parser.add_argument("--table", action="store_true", help="write the tables of the READMEs")
    parser.add_argument("--out", type=Path, default=default, help="folder of the result files")
    parser.add_argument("--entries", choices=("all", "main", "rivals"), default="all")
    parser.add_argument("--only", default="", help="of those, only these jobs: save_on_cpu,checkpoint")
    parser.add_argument("--timeout", type=float, default=0.0, help="seconds for a process; default: enough")
    parser.add_argument("--within", type=float, default=0.0, help="seconds for the whole call")
    parser.add_argument("--bundle", type=Path, help="also write all results of this call to one file")
    parser.add_argument("--unpack", type=Path, help="write the results of such a file to --out")
    parser.add_argument("--grow-host", default="", help="use so much host memory once, first")
    parser.add_argument("--verbose", action="store_true", help="show what the jobs say")
    for name in ("--worker", "--to"):
        parser.add_argument(name, default="", type=Path if name == "--to" else str, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--cap-bytes", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
