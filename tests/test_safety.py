"""The benchmark of safety: what it leaves out, and that it is all there again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from torchlms.bench import provenance
from torchlms.bench.options import BenchOptions
from torchlms.eager import watcher
from torchlms.eager.provenance import Provenance
from torchlms.eager.saved import Kept, Saved

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import rows  # noqa: E402
import safety  # noqa: E402

PARTS = [(Saved, "check"), (Kept, "check"), (watcher, "_make_readers_real"), (Provenance, "written")]


def test_it_is_left_out_and_back_again_even_after_an_error() -> None:
    before = [getattr(owner, name) for owner, name in PARTS]
    leaving = safety.without_safety()
    leaving.__enter__()
    assert all(getattr(owner, name) is safety._nothing for owner, name in PARTS)
    assert not leaving.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert [getattr(owner, name) for owner, name in PARTS] == before


def test_a_tiny_network_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BenchOptions("llama", 8, device="cpu", hidden=32, layers=4, heads=2, sequence=64, vocab=50)
    row = replace(rows.ROWS["cpu-transformer"], name="tiny", options=options, share=0.7, warmup=4)
    monkeypatch.setitem(safety.ROWS, "tiny", row)
    monkeypatch.setattr(safety, "_MOST", 1e9)
    path = tmp_path / "safety.json"
    assert safety.main(["tiny", "--turns", "2", "--steps", "2", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["code"] == provenance.code_hash()
    assert result["moves"] > 0
    assert len(result["turns"]) == 2
    assert result["least"] <= result["times_as_long"] <= result["most"]
