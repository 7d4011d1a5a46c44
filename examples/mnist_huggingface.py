"""The MNIST network in Hugging Face's Trainer, within a device memory budget.

    python examples/mnist_huggingface.py                                   # scikit-learn's 8x8 digits
    python examples/mnist_huggingface.py --mnist DIRECTORY --budget 96MiB  # the four files of MNIST

Without a GPU the "device" is this process's RAM under the budget, and idle values wait in a file.
"""

import argparse
import gzip
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from torchlms.integrations.huggingface import LMSCallback

ON_GPU = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default=None if ON_GPU else "12MiB", help="such as 16GiB")
    parser.add_argument("--mnist", type=Path, help="directory with train-images-idx3-ubyte and its siblings")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()

    images, labels, test_images, test_labels = mnist(options.mnist) if options.mnist else digits()
    callback = LMSCallback(budget=options.budget)
    trainer = Trainer(
        model=Network(images.shape[-1]),
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=1e-3,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
        ),
        data_collator=collate,
        train_dataset=TensorDataset(images, labels),
        eval_dataset=TensorDataset(test_images, test_labels),
        compute_metrics=accuracy,
        callbacks=[callback],  # this line is all
    )
    trainer.train()
    print(callback.lms.report())


class Network(nn.Module):
    """Two convolutions and two linear layers, for ``edge`` times ``edge`` pixels; gives loss and logits."""

    def __init__(self, edge: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            *(nn.Linear(64 * (edge // 4) ** 2, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10)),
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.layers(images)
        return F.cross_entropy(logits, labels), logits


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def accuracy(seen: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(seen.predictions.argmax(1) == seen.label_ids))}


def digits() -> tuple[torch.Tensor, ...]:
    """1500 images of 8x8 to learn from, and 297 to be tested with."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def mnist(directory: Path) -> tuple[torch.Tensor, ...]:
    """60000 images of 28x28 to learn from, and 10000 to be tested with."""
    parts = []
    for name in ("train", "t10k"):
        parts.append(read_idx(directory / f"{name}-images-idx3-ubyte").unsqueeze(1).float() / 255)
        parts.append(read_idx(directory / f"{name}-labels-idx1-ubyte").long())
    return tuple(parts)


def read_idx(path: Path) -> torch.Tensor:
    """MNIST's own format: two zeros, a type, how many sizes, the sizes, then the bytes."""
    data = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    start = 4 + 4 * data[3]
    sizes = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).view(sizes)


if __name__ == "__main__":
    main()
