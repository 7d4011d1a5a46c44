"""docs/trainers.md: every snippet runs as it stands, with a model, data and a directory at hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trained import assert_off_for_good

GUIDE = Path(__file__).resolve().parent.parent.parent / "docs" / "trainers.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
LIBRARIES = ("transformers", "lightning", "keras")


def library_of(snippet: str) -> str:
    return next((name for name in LIBRARIES if name in snippet or f"import {name}" in snippet), "")


def for_a_loop(_: Path) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    batches = [(torch.randn(16, 8), torch.randint(0, 4, (16,))) for _ in range(5)]
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "loader": batches}


def for_transformers(directory: Path) -> dict[str, Any]:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None
    )
    return {
        "Trainer": transformers.Trainer,
        "model": transformers.GPT2LMHeadModel(config),
        "arguments": transformers.TrainingArguments(
            output_dir=str(directory), max_steps=5, use_cpu=True, report_to="none", disable_tqdm=True
        ),
        "dataset": [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(64)],
    }


def for_lightning(directory: Path) -> dict[str, Any]:
    lightning = pytest.importorskip("lightning")
    found = for_a_loop(directory)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = for_a_loop(directory)["model"]

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(80, 8), torch.randint(0, 4, (80,))), 16
    )
    return {**found, "module": Module(), "loader": loader, "directory": directory}


def for_keras(directory: Path) -> dict[str, Any]:
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images, labels = torch.randn(128, 8).numpy(), torch.randint(0, 4, (128,)).numpy()
    return {"model": model, "images": images, "labels": labels, "directory": directory}


AT_HAND = {"": for_a_loop, "transformers": for_transformers, "lightning": for_lightning, "keras": for_keras}


def test_each_trainer_has_its_snippet() -> None:
    assert {library_of(snippet) for snippet in SNIPPETS} == {"", *LIBRARIES}


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
@pytest.mark.filterwarnings("ignore")
def test_runs(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippet = SNIPPETS[number]
    library = "transformers" if "Trainer(model=" in snippet else library_of(snippet)
    exec(compile(snippet, f"{GUIDE.name}, snippet {number}", "exec"), AT_HAND[library](tmp_path))
    if "report()" in snippet:
        assert "1 of them recorded" in capsys.readouterr().out
    assert_off_for_good()
