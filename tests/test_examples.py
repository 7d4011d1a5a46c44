"""examples/: each runs as a newcomer runs it, at its small default size, and values really move."""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

from tests import forked

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# What each needs beyond the core, and what makes the run shorter than by default.
NEEDS = {
    "language_model_long_sequence": (
        ["transformers", "accelerate"],
        ["--tokens", "512", "--budget", "28MiB"],
    ),
    "mnist_fabric": (["lightning", "sklearn"], ["--epochs", "2"]),
    "mnist_huggingface": (["transformers", "accelerate", "sklearn"], ["--epochs", "2"]),
    "mnist_keras": (["keras", "sklearn"], []),
    "mnist_lightning": (["lightning", "sklearn"], ["--epochs", "2"]),
    "mnist_loop": (["sklearn"], ["--epochs", "2"]),
    "resnet_high_resolution": ([], ["--steps", "4"]),
}


def run(name: str, *options: str) -> str:
    """What it prints."""
    libraries, _ = NEEDS[name]
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = forked.run(str(EXAMPLES / f"{name}.py"), *options, cwd=Path.cwd(), environment=environment)
    assert done.status == 0, done.err[-4000:]
    return done.out


def test_all_are_here() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_runs_and_moves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    printed = run(name, *NEEDS[name][1])
    found = re.search(r"^out (\S+ \S+) and in (\S+ \S+) per step", printed, re.MULTILINE)
    assert found, printed
    assert "0 B" not in found.groups()


@pytest.mark.parametrize("name", ["mnist_loop", pytest.param("mnist_huggingface", marks=pytest.mark.more)])
def test_files_of_mnist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files of the real format, one of them packed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for part, count in (("train", 32), ("t10k", 16)):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.randint(0, 10, (count,), dtype=torch.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    printed = run(name, "--mnist", str(tmp_path), "--budget", "1GiB", "--epochs", "1")
    assert "1 of them recorded" in printed


def idx(values: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.numpy().tobytes()


@pytest.mark.parametrize("name", NEEDS)
def test_short_enough_to_read(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 125
