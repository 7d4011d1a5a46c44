"""Every command of README and docs is carried out, in an empty folder with the files that it names.

``commands.py`` says which are made smaller, and which few are not carried out and why.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("jinja2")

from tapes import GIB, gpu

from tests import forked
from tests.docs.commands import COMMANDS, MORE, NOT_RUN, as_run
from tests.fit.batches import step
from tests.report_page.profiles import BEHIND
from tests.report_page.runs import run
from torchlms.__main__ import main

TRAIN = """
import sys, torch
assert sys.argv[1:] == ["--epochs", "10"]
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for epoch in range(10):
    model(torch.randn(32, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained")
"""
FACTORY = """
from torch import nn
def factory():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
"""
RUN = [
    pytest.param(command, id=command, marks=[pytest.mark.more] if command in MORE else [])
    for command in COMMANDS
    if command not in NOT_RUN
]
# What a command must have left, or said, besides ending well.
LEFT = ("--save-run", "--save-tape", "--save", "--json", "--trace", "-o")
SAYS = {
    "torchlms bench": "^total (images|samples)/sec",
    "torchlms fit": "largest batch|fits|recorded",
    "torchlms run": "^trained$",
    "torchlms doctor": "^ok",
    "torchlms probe": "disk",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With what the commands name: scripts, a network of one's own, and records that come from elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("train.py", TRAIN),
        ("package/train.py", TRAIN),
        ("yourpackage/yourmodule.py", FACTORY),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    run("host").save(tmp_path / "run.json")
    run("host").tape.save(tmp_path / "tape.json")
    run("host").machine.save(tmp_path / "rates.json")
    for batch in (50, 100):
        step(batch, device="Card").save(tmp_path / f"resnet50-{batch}.json")
    replace(gpu(), device="Card", host_available_bytes=80 * GIB).save(tmp_path / "card.json")
    (tmp_path / "profile.json").write_text(json.dumps({"traceEvents": BEHIND}))
    (tmp_path / "began").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("yourpackage.yourmodule", None)
    sys.modules.pop("yourpackage", None)


@pytest.mark.parametrize("command", RUN)
def test_it_does_what_it_says(command: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(as_run(command))
    files = [Path(words[at + 1]) for at, word in enumerate(words) if word in LEFT]
    for path in files:
        path.unlink(missing_ok=True)
    assert words[0] == "torchlms"
    status = script(words) if words[1] == "run" else main(words[1:])
    said = "".join(capfd.readouterr())
    # The doctor's last word is its status: whether this machine needs attention.
    assert status == 0 or (words[1] == "doctor" and status == 1), said
    for path in files:  # a name may get the batch size: a tape each of several
        found = Path().glob(f"{path.stem}*{path.suffix}")
        assert [one for one in found if one.stat().st_mtime > began(folder)]
    wanted = next((text for begin, text in SAYS.items() if command.startswith(begin)), "")
    assert re.search(wanted, said, re.MULTILINE), said


def began(folder: Path) -> float:
    return (folder / "began").stat().st_mtime


def script(words: list[str]) -> int:
    """A script under LMS needs a process of its own."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return forked.run_with((0, 1, 2), *words, cwd=Path.cwd(), environment=environment)


def test_what_is_not_run_is_there() -> None:
    assert {*COMMANDS} >= MORE
    assert sorted(NOT_RUN) == [command for command in COMMANDS if not command.startswith("torchlms ")]
