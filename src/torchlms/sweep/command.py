"""Command: run the sweep for one kind of device and put it into the table.

python -m torchlms.sweep.command [--device cpu|cuda] [--within SECONDS] [--out FILE]
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from torchlms.eager.replayable import TABLE
from torchlms.sweep.sweep import Finding, sweep

_EVERY = 50  # samples between two lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torchlms.sweep.command", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--within", type=float, default=float("inf"), help="seconds; default: as long as it takes"
    )
    parser.add_argument(
        "--out", type=Path, default=TABLE, help="the table; other devices' parts of it are kept"
    )
    asked = parser.parse_args(arguments)
    count = 0

    def progress(name: str) -> None:
        nonlocal count
        count += 1
        if count % _EVERY == 0:
            print(f"{count} samples, now {name}", file=sys.stderr, flush=True)

    device = torch.device(asked.device)
    findings = sweep(device, within_s=asked.within, progress=progress)
    write(asked.out, device, findings)
    for verdict, number in collections.Counter(
        found.verdict.value for found in findings.values()
    ).most_common():
        print(f"{number:5} {verdict}")
    return 0


def write(path: Path, device: torch.device, findings: dict[str, Finding]) -> None:
    """Put ``findings`` in place of what the table says of this kind of device."""
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    table[device.type] = {
        "device": name,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "ops": {
            op: {"verdict": found.verdict.value, "trials": found.trials}
            | ({"why": found.why} if found.why else {})
            for op, found in sorted(findings.items())
        },
    }
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
