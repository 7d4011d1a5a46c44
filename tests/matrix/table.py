"""docs/loops.md: what it says, and how it is written from a run of the matrix."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.matrix.matrix import GROUPS
from tests.matrix.row import STEPS, WAYS

FILE = Path(__file__).resolve().parents[2] / "docs" / "loops.md"
HEAD = "| loop | what it does | values move | values may be made again |\n| --- | --- | --- | --- |"

ABOUT = """\
# Training loops

What people write, and what becomes of it under LMS. Each row is a loop that is trained plainly and under a \
budget of a share of its plain peak, for {steps} steps in which values leave and come back. All losses, \
gradients, parameters,\
 buffers, optimizer states and the state of the random generator are compared bit by bit.

- **same bits**: nothing differs. Plain PyTorch was run twice and repeats itself in all of these.
- **slower, for steps are not as planned**: a step that is unlike the recorded one is recorded anew. Until \
there is a plan, values leave when memory runs out and come back when they are needed.
- **slower, without a plan**: that is how all of it went: no plan fits, or no step came twice.
- **bits of any dispatch mode**: PyTorch itself computes otherwise, and as exactly, as soon as any dispatch \
mode is on; LMS leaves the bits that one leaves which only looks on.
- **refused**: the error is raised at once, and training goes on without it.

In the third column values only move (`recompute=False`); in the last one they may also be made again, \
as is the default.

Written by `make loops` from the tests in `tests/matrix`, which run each row again and compare it with this \
table. That is on the CPU, where every loop repeats its bits; with torch {torch}.
"""


def written(cells: dict[tuple[str, str], str]) -> str:
    """The whole file, from what was found by row and way."""
    text = [ABOUT.format(steps=STEPS, torch=torch.__version__)]
    for title, rows in GROUPS.items():
        lines = [
            f"| {row.name} | {row.what} | {' | '.join(cells[row.name, way] for way in WAYS)} |"
            for row in rows
        ]
        text.append("\n".join([f"## {title}\n", HEAD, *lines]) + "\n")
    return "\n".join(text)


def is_of_this_torch() -> bool:
    """Whether the file was written with the torch that runs now: another may word or do things otherwise."""
    return f"with torch {torch.__version__}.\n" in FILE.read_text()


def committed() -> dict[tuple[str, str], str]:
    """What the file says by row and way."""
    lines = [line for line in FILE.read_text().splitlines() if line.startswith("| ")]
    split = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {
        (name, way): cell
        for name, _, *cells in split
        if name not in ("loop", "---")
        for way, cell in zip(WAYS, cells, strict=True)
    }
