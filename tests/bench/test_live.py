"""The live line: on a terminal only, renewed as steps end, gone at the end."""

from __future__ import annotations

import io
import re
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import torchlms
from torchlms import live
from torchlms.bench.command import pace
from torchlms.bench.options import BenchOptions
from torchlms.cli import app
from torchlms.live import live_line, sentence

ERASE = "\x1b[2K"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setattr(live, "_EVERY_S", 0.0)
    monkeypatch.delenv("TORCHLMS_LOG", raising=False)
    return Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def train(model: torch.nn.Module, steps: int = 6) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(torch.ones(64, next(model.parameters()).shape[1])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_it_says_what_lms_does(terminal: Console, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
    with live_line(torchlms.stats, terminal), torchlms.LMS(model, budget="1GiB", disk_dir=tmp_path):
        assert "torchlms: starting" in shown(terminal)
        train(model)
    text = shown(terminal)
    assert re.search(r"torchlms: recording, which is slow, step 1, \d+ ms, device", text)
    assert "torchlms: following a plan, step 6," in text
    assert text.endswith(ERASE), "the line is gone"


def test_an_exception_takes_it_away(terminal: Console) -> None:
    asked = []
    with pytest.raises(KeyboardInterrupt), live_line(lambda: asked.append(1) or {"state": "off"}, terminal):
        raise KeyboardInterrupt
    assert shown(terminal).endswith(ERASE)
    train(torch.nn.Linear(4, 4), steps=1)
    assert not asked, "its hook is gone, too"


@pytest.mark.parametrize("why", ["no terminal", "TORCHLMS_LOG"])
def test_nothing_is_shown_where_nobody_asked(
    why: str, terminal: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "TORCHLMS_LOG":
        monkeypatch.setenv("TORCHLMS_LOG", "off")
    console = terminal if why == "TORCHLMS_LOG" else Console(file=io.StringIO(), width=120)
    with live_line(dict, console):
        train(torch.nn.Linear(4, 4), steps=1)
    assert shown(console) == ""


def test_it_is_not_renewed_more_often_than_one_can_read(
    terminal: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_EVERY_S", 60.0)
    asked: list[int] = []
    with live_line(lambda: asked.append(1) or {"state": "off"}, terminal):
        train(torch.nn.Linear(4, 4))
    assert not asked


FIGURES = {
    "state": "guard",
    "peak_device_bytes": 15 << 30,
    "budget_bytes": 16 << 30,
    "bytes_out_per_step": 10 << 30,
    "bytes_in_per_step": 9 << 30,
    "peak_host_bytes": 12 << 30,
    "host_budget_bytes": 64 << 30,
    "reclaims": 0,
    "lessons": 0,
    "racing": False,
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {},
            "following a plan, step 42, 612 ms, 327 images/s, device 15.0/16.0 GiB, "
            "host 12.0/64.0 GiB, out/in 10.0/9.0 GiB",
        ),
        ({"lessons": 3, "racing": True}, "learning where memory is tight, step 42, 612 ms"),
        (
            {"peak_host_bytes": 0, "reclaims": 3},
            "following a plan, step 42, 612 ms, 327 images/s, device 15.0/16.0 GiB, "
            "out/in 10.0/9.0 GiB, 3 reclaims",
        ),
        ({"racing": True}, "trying one plan after the other, step 42"),
        (
            {"state": "aside", "bytes_out_per_step": 0},
            "everything fits, LMS stands aside, step 42, 612 ms, 327 images/s, device 15.0/16.0 GiB",
        ),
        ({"state": "record"}, "recording, which is slow, step 42, device"),
        (
            {"peak_device_bytes": 900 << 20},
            "following a plan, step 42, device 900.0 MiB/16.0 GiB",
        ),
    ],
)
def test_the_sentence(change: dict[str, Any], text: str) -> None:
    step_s = 0.0 if "step 42, device" in text else 0.612
    said = sentence({**FIGURES, **change}, step=42, step_s=step_s, items=200, unit="images")
    assert said.startswith(text)


@pytest.mark.parametrize("change", [{}, {"lessons": 3}])
def test_eighty_columns_show_all_there_is(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_EVERY_S", 0.0)
    monkeypatch.delenv("TORCHLMS_LOG", raising=False)
    narrow = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    stats = {**FIGURES, "reclaims": 123, **change}
    with live_line(lambda: stats, narrow, items=71_000, unit="tokens"):
        train(torch.nn.Linear(4, 4), steps=1)
    rows = re.split(r"\x1b\[[?0-9]*[A-Za-z]|\r|\n", shown(narrow))
    first, second = [row for row in rows if row][-2:]
    assert max(len(first), len(second)) <= 80
    assert first.endswith("tokens/s,")
    assert second == "  device 15.0/16.0 GiB, host 12.0/64.0 GiB, out/in 10.0/9.0 GiB, 123 reclaims"


def test_a_wide_terminal_has_one_line() -> None:
    assert live.folded(sentence(FIGURES), 160) == [sentence(FIGURES)]


def test_without_a_batch_size_there_is_no_rate() -> None:
    assert "/s" not in sentence(FIGURES, step=42, step_s=0.612)


def test_the_rate_is_of_all_that_lies_between_two_steps_of_the_optimizer(terminal: Console) -> None:
    """Gradient accumulation: what LMS measures is a pass, of which there are several in a step."""
    told: list[Any] = []

    def listen(step_ended: Any) -> torch.utils.hooks.RemovableHandle:
        told.append(step_ended)
        return torch.utils.hooks.RemovableHandle(OrderedDict())

    stats = {**FIGURES, "measured_step_s": 0.001}
    with live_line(lambda: stats, terminal, items=100, listen=listen):
        time.sleep(0.2)
        told[0]()
    found = re.search(r"step 1, (\d+) ms, (\d+) items/s", shown(terminal))
    assert found is not None
    assert int(found[1]) >= 200
    assert 100 <= int(found[2]) <= 500


def test_the_rate_is_that_of_the_network() -> None:
    assert pace(BenchOptions(model="mnist", batch_size=48, device="cpu")) == (48, "images")


def test_bench_without_a_terminal_is_as_it_was() -> None:
    done = CliRunner().invoke(
        app,
        [
            "bench",
            "--model=mnist",
            "--batch-size=4",
            "--device=cpu",
            "--num-batches=1",
            "--warmup=1",
            "--no-lms",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "torchlms:" not in done.output
