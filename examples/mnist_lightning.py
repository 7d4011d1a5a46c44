"""The MNIST network in Lightning's Trainer, within a device memory budget.

python examples/mnist_lightning.py          # scikit-learn's 8x8 digits, no download
"""

import argparse
import tempfile

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchlms.integrations.lightning import LMSCallback

ON_GPU = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default=None if ON_GPU else "12MiB", help="such as 16GiB")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    callback = LMSCallback(budget=options.budget)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        devices=1,
        default_root_dir=tempfile.mkdtemp(),
        log_every_n_steps=1,
        callbacks=[callback],  # this line is all
    )
    trainer.fit(
        Classifier(),
        DataLoader(TensorDataset(images[:1500], labels[:1500]), options.batch_size, shuffle=True),
        DataLoader(TensorDataset(images[1500:], labels[1500:]), options.batch_size),
    )
    print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
    print(callback.lms.report())


class Classifier(lightning.LightningModule):
    """Two convolutions and two linear layers, for images of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            *(nn.Linear(64 * 4, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10)),
        )

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.layers(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


if __name__ == "__main__":
    main()
