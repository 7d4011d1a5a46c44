"""The commands of README and docs, and how each is tried: as it stands, at a small size, or only read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from torchlms.cli import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])

_COMMAND = re.compile(r"^ {4}((?:torchlms|python|make|pip) .*?)$", re.MULTILINE)

# The examples are of a ResNet-50 on a GPU. The verb, and every option that is not about size, are as the page
# has them; the last of two options counts.
_SMALL_BENCH = "--model mnist --batch-size 8 --num-batches 1 --warmup 1 --device cpu"
_SMALL_FIT = "--model mnist --batch-size 8 --device cpu"
SMALLER = {
    "torchlms bench --model resnet50": _SMALL_BENCH,
    "torchlms bench --model yourpackage": "--num-batches 1 --warmup 1 --device cpu --budget 1GiB",
    "torchlms fit --model resnet50": _SMALL_FIT,
}

# Run by `make more` only: each is like another one that stays, or takes a process for each rival.
MORE = {
    "torchlms bench --model resnet50 --batch-size 200 --budget 16GiB --compare none,save_on_cpu,checkpoint",
    "torchlms fit --model resnet50 --batch-size 200 --budget 24GiB --largest",
    "torchlms report run.json --trace trace.json",
    "torchlms report run.json -o report.html",
}

# Read by the command line's own parser, or looked up, and not carried out.
NOT_RUN = {
    "make demo": "minutes; .ci/run runs it",
    "make test": "it is what runs this; .ci/run runs it",
    "pip install '.[cli]'": "a download; `make test` begins with the same line, editable",
}


def commands(page: Path) -> list[str]:
    text = page.read_text().replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in _COMMAND.findall(text)]


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


def as_run(command: str) -> str:
    """The command with what makes it small."""
    return " ".join([command, *(more for begin, more in SMALLER.items() if command.startswith(begin))])


def can_be_read(words: list[str]) -> None:
    """Parse, and do nothing; raises what the command line says to words that it does not know."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("torchlms", list(words))
    left = [*getattr(context, "_protected_args", []), *context.args]
    if left:
        name, verb, rest = group.resolve_command(context, left)
        verb.make_context(name, rest, parent=context)
