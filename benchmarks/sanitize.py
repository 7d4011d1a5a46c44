"""Sanitize: one small run of each way that a value can take, under tools that see races and wild accesses.

    python benchmarks/sanitize.py                 each path under each tool that is here
    python benchmarks/sanitize.py --only host     some paths, added to what this code has found already

torch's own sanitizer (TORCH_CUDA_SANITIZER) knows which stream reads and writes which memory, and raises
where nothing orders two of them. compute-sanitizer's memcheck, where it is on PATH, sees what is read or
written out of bounds or after it was freed. Each run is a process of its own; results/sanitizer.json says
what came of each, as soon as it has ended. Fails if one of them found something, or did not take the way that
it is there for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from facts import device_facts, found_before, without_paths
from result_file import save
from torch import nn

import torchlms
from torchlms.bench import provenance
from torchlms.eager import backward_thread, private
from torchlms.eager.install import WatchMode

RESULT = Path(__file__).resolve().parent / "results" / "sanitizer.json"
MIB = 1 << 20
_WIDTH, _LAYERS, _BATCH = 1024, 8, 8192  # values of 32 MiB; some 700 MiB in all
_TIGHT = 480 * MIB
_STEPS = 8
_LAST_LINES = 30
_COUNTED = ("bytes_out_per_step", "bytes_in_per_step", "disk_bytes_per_step", "replayed_ops", "reclaims",
            "verified_values")  # fmt: skip
_EVERYTHING = {"min_bytes": 512, "move_ops": ["*"], "recompute": False}
_MOVES = {"recompute": False}


@dataclass(frozen=True, slots=True)
class Journey:
    """Options of LMS under which values take one way, and the figure that shows that they did."""

    figure: str
    options: dict[str, Any] = field(default_factory=dict)
    reclaims: bool = False  # everything leaves at once between forward and backward


PATHS = {
    "host": Journey("bytes_out_per_step", {"budget": _TIGHT, "rules": _MOVES}),
    "disk": Journey(
        "disk_bytes_per_step", {"budget": 4096 * MIB, "rules": _EVERYTHING, "host_budget": 64 * MIB}
    ),
    # Under memcheck to run an op again takes longer than to move its result: not where it would go to disk.
    "recompute": Journey("replayed_ops", {"budget": _TIGHT, "recompute": True, "host_budget": 64 * MIB}),
    "ladder": Journey("reclaims", {"budget": _TIGHT, "plan": False}),
    "reclaim": Journey("reclaims", {"budget": 4096 * MIB, "rules": _EVERYTHING}, reclaims=True),
    "verify": Journey("verified_values", {"budget": _TIGHT, "rules": _MOVES, "verify": 1}),
}


@dataclass(frozen=True, slots=True)
class Tool:
    """How a process is watched."""

    name: str
    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""


def tools() -> Iterator[Tool]:
    yield Tool("torch.cuda._sanitizer", environment={"TORCH_CUDA_SANITIZER": "1"})
    memcheck = shutil.which("compute-sanitizer")
    if memcheck is not None:
        # For the Python part of backtraces it keeps frames, and those their tensors: nothing could leave.
        quiet = ("--report-api-errors", "no", "--show-backtrace", "no")
        yield Tool("memcheck", (memcheck, *quiet, "--error-exitcode", "86"))


def main(arguments: list[str] | None = None) -> int:
    asked = _arguments(arguments)
    if asked.path:
        print(json.dumps(run_path(PATHS[asked.path])))
        return 0
    head = {
        "schema": "torchlms.sanitizer/1",
        "command": "python benchmarks/sanitize.py",
        "memcheck": "run" if shutil.which("compute-sanitizer") else "not on PATH",
        **device_facts(torch.device("cuda")),
        "code": provenance.code_hash(),
    }
    before = found_before(asked.json, head).get("findings", [])
    findings = {(one["tool"], one["path"]): one for one in before}
    for tool in tools():
        for name in asked.only.split(",") if asked.only else PATHS:
            findings[tool.name, name] = finding(tool, name, asked.timeout)
            clean = all(one["clean"] for one in findings.values())
            found = {"clean": clean, "findings": list(findings.values()), "date": provenance.now()}
            save(head | found, asked.json)
    return 0 if clean else 1


def finding(tool: Tool, name: str, timeout_s: float) -> dict[str, Any]:
    """One path under one tool: whether it was clean, and the last that the process said if it was not."""
    began_s = time.monotonic()
    command = [*tool.command, sys.executable, str(Path(__file__).resolve()), "--path", name]
    environment = {**os.environ, **tool.environment, "TORCHLMS_LOG": "off"}
    took: dict[str, Any] = {}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
        said = done.stdout + done.stderr
        why = f"exit code {done.returncode}" if done.returncode else ""
        took = _last_json(done.stdout)
    except subprocess.TimeoutExpired:
        said, why = "", f"no result in {timeout_s:.0f} s"
    if not why and not took.get(PATHS[name].figure):
        why = f"no value took this way: {PATHS[name].figure} is 0"
    lines = without_paths(said).splitlines()[-_LAST_LINES:] if why else []
    print(f"{tool.name}, {name}: {why or 'clean'} in {time.monotonic() - began_s:.0f} s", flush=True)
    print("\n".join(lines), end="\n" if lines else "")
    return {
        "tool": tool.name,
        "path": name,
        "clean": not why,
        "why": why,
        "said": lines,
        "took": took,
        "seconds": round(time.monotonic() - began_s, 1),
    }


def _last_json(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return dict(json.loads(line))
    return {}


# -- the process that is watched -------------------------------------------------------------------


def run_path(
    path: Journey, device: str = "cuda", *, width: int = _WIDTH, batch: int = _BATCH
) -> dict[str, Any]:
    """A few steps; what LMS says of them."""
    if "TORCH_CUDA_SANITIZER" in os.environ:
        show_all_ops()
        _leave_out_set()
    torch.manual_seed(1)
    parts = [part for _ in range(_LAYERS) for part in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))]
    model = nn.Sequential(*parts, nn.Linear(width, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with (
        tempfile.TemporaryDirectory(prefix="torchlms-sanitize-") as folder,
        torchlms.LMS(model, optimizer, disk_dir=folder, **path.options) as lms,
    ):
        for _ in range(_STEPS):
            inputs = torch.randn(batch, width, device=device)
            loss = F.cross_entropy(model(inputs), torch.randint(0, 10, (batch,), device=device))
            if path.reclaims:
                lms.reclaim()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
        stats = lms.stats()
    return {name: stats[name] for name in _COUNTED}


def show_all_ops() -> None:
    """Have the sanitizer see our own copies, too.

    In hooks our ops pass all dispatch modes by, and the sanitizer is one: it would miss just those copies
    that may race. Here they pass only our own mode by, also where they run in the thread of backward.
    """
    ours = WatchMode.__torch_dispatch__
    as_backward = backward_thread._as_backward
    private.unwatched = _Passing  # type: ignore[assignment]
    backward_thread._as_backward = lambda device, deed: as_backward(device, lambda: _shown(deed))

    def dispatch(
        self: WatchMode,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _Passing.depth:
            return func(*args, **(kwargs or {}))
        return ours(self, func, types, args, kwargs)

    WatchMode.__torch_dispatch__ = dispatch  # type: ignore[method-assign]


def _shown(deed: Callable[[], Any]) -> Any:
    """Carry ``deed`` out where a thread was handed what holds inside a dispatch mode: torch does not save the
    state for a mode below a second time in there, and this thread has not saved any."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    saves = torch._C.DispatchKeySet(torch._C.DispatchKey.PythonTLSSnapshot)
    with torch._C._ForceDispatchKeyGuard(include, exclude - saves):
        return deed()


class _Passing:
    """A context in which ops pass our mode by and no other; the same in all threads of one backward pass,
    of which one runs at a time."""

    depth = 0

    def __enter__(self) -> None:
        _Passing.depth += 1

    def __exit__(self, *exception: object) -> None:
        _Passing.depth -= 1


def _leave_out_set() -> None:
    """``set_`` moves no bytes, but the sanitizer takes it for a write."""
    from torch.cuda._sanitizer import CUDASanitizerDispatchMode

    watched: Callable[..., Any] = CUDASanitizerDispatchMode.__torch_dispatch__
    packet = torch.ops.aten.set_
    moving_nothing = {getattr(packet, overload) for overload in packet.overloads()}

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in moving_nothing:
            return func(*args, **(kwargs or {}))
        return watched(self, func, types, args, kwargs)

    CUDASanitizerDispatchMode.__torch_dispatch__ = dispatch  # type: ignore[method-assign]


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of {','.join(PATHS)}")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each process")
    parser.add_argument("--json", type=Path, default=RESULT, help="where the result goes")
    parser.add_argument("--path", choices=list(PATHS), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
