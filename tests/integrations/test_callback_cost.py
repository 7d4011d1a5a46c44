"""The benchmark of callbacks: an example runs as it stands, and what its callback takes is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from torchlms.bench import provenance

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import callbacks  # noqa: E402


def test_an_example_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    path = tmp_path / "callbacks.json"
    callbacks.main(["mnist_lightning", "--epochs", "2", "--runs", "1", "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["schema"] == "torchlms.callbacks/1"
    assert result["code"] == provenance.adapters_hash()
    (found,) = result["examples"].values()
    (run,) = found["runs"]
    assert run["steps"] == 12
    assert run["calls"] == 12 + 2 + 2, "each step, each epoch, the beginning and the end"
    assert 0 < run["own_s"] < run["run_s"]
    assert found["share"] == pytest.approx(run["own_s"] / run["run_s"])


def test_a_callback_that_takes_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "EXAMPLES", {"some": ("keras", "torch")})
    asked = {"run_s": 10.0, "own_s": 0.2, "calls": 3, "steps": 2}
    monkeypatch.setattr(callbacks, "_one", lambda name, epochs: asked)
    assert callbacks.main(["--runs", "2", "--json", str(tmp_path / "found.json")]) == 1


def test_an_example_that_there_is_none_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        callbacks.main(["mnist_flax"])
    assert "no such example: mnist_flax; there are mnist_huggingface" in capsys.readouterr().err


def test_results_are_stale_when_an_adapter_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "callbacks.json"
    result = {"schema": "torchlms.callbacks/1", "code": provenance.adapters_hash()}
    path.write_text(json.dumps(result))
    assert provenance.stale_results(tmp_path) == []
    path.write_text(json.dumps(result | {"code": "another"}))
    assert provenance.stale_results(tmp_path) == [path]
