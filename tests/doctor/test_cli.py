"""``torchlms doctor`` as a user meets it: lines, JSON, exit status; nothing is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from tests import forked
from tests.forked import Ended
from tests.runner.runs import ENVIRONMENT
from torchlms.doctor.finding import State, attention, fine, note


def doctor(*arguments: str, **environment: str) -> Ended:
    return forked.run("torchlms", "doctor", *arguments, cwd=Path.cwd(), environment=ENVIRONMENT | environment)


def test_lines_for_a_pipe(tmp_path: Path) -> None:
    done = doctor("--json", str(tmp_path / "found.json"), TORCHLMS_CACHE=str(tmp_path / "cache"))
    assert done.status in (0, 1), done.err
    assert "\x1b" not in done.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["schema"] == "torchlms.doctor/1"
    assert found["fine"] == (done.status == 0)
    topics = [item["topic"] for item in found["findings"]]
    assert {"system", "torch", "device", "host memory", "memlock", "disk", "disk rate", "cache"} <= set(
        topics
    )
    lines = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines[:-1]] == [item["state"] for item in found["findings"]]
    assert lines[-1].endswith("attention")
    for item in found["findings"]:
        assert item["found"] in done.out
        assert item["next_step"] in done.out
        assert item["state"] != "attention" or item["next_step"]


def test_json_alone_on_standard_output(tmp_path: Path) -> None:
    done = doctor("--json", "-", TORCHLMS_CACHE=str(tmp_path))
    assert json.loads(done.out)["findings"]


def test_what_needs_attention_ends_with_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = doctor(TORCHLMS_CACHE=str(tmp_path / "file"))
    assert done.status == 1
    assert "attention  cache" in done.out
    assert "next: set TORCHLMS_CACHE to a folder of yours" in done.out
    assert "needs attention" in done.out or "need attention" in done.out


def test_rates_come_from_the_cache(tmp_path: Path) -> None:
    environment = {"TORCHLMS_CACHE": str(tmp_path / "cache")}
    before: dict[str, Any] = json.loads(doctor("--json", "-", f"--disk-dir={tmp_path}", **environment).out)
    rate = next(item for item in before["findings"] if item["topic"] == "disk rate")
    assert rate["found"] == "not measured yet"
    assert not (tmp_path / "cache").exists(), "looking measures nothing"
    probe = ["torchlms", "probe", "--disk-dir", str(tmp_path)]
    done = forked.run(*probe, cwd=tmp_path, environment=ENVIRONMENT | environment)
    assert done.status == 0, done.err
    after = json.loads(doctor("--json", "-", f"--disk-dir={tmp_path}", **environment).out)
    rate = next(item for item in after["findings"] if item["topic"] == "disk rate")
    assert "GB/s" in rate["found"] or "could not be measured" in rate["found"]


def test_help_has_an_example() -> None:
    assert "Example: torchlms doctor" in doctor("--help").out


def test_one_fault_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchlms.doctor import command

    said: list[tuple[str, State | None]] = []
    findings = [fine("a", "good"), note("b", "so so", "think"), attention("c", "bad", "mend")]
    monkeypatch.setattr(command, "examine", lambda folder: iter(findings))
    assert not command.doctor(None, lambda line, state: said.append((line, state)))["fine"]
    assert [line.split()[0] for line, state in said if state] == ["ok", "note", "attention"]
    assert said[-1][0] == "1 thing needs attention"
    monkeypatch.setattr(command, "examine", lambda folder: iter(findings[:2]))
    assert command.doctor(None, lambda line, state: None)["fine"]
