"""The MNIST network in a loop of Lightning Fabric, within a device memory budget.

python examples/mnist_fabric.py          # scikit-learn's 8x8 digits, no download
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchlms.integrations.lightning import FabricLMS

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

    fabric = lightning.Fabric(devices=1)
    model = network()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), 1e-3))
    batches = fabric.setup_dataloaders(
        DataLoader(TensorDataset(images[:1500], labels[:1500]), options.batch_size, shuffle=True)
    )

    with FabricLMS(fabric, model, optimizer, budget=options.budget) as lms:  # this line is all
        for epoch in range(options.epochs):
            model.train()
            for some, truth in batches:
                loss = F.cross_entropy(model(some), truth)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                right = model(fabric.to_device(images[1500:])).argmax(1).cpu() == labels[1500:]
            fabric.print(f"epoch {epoch + 1}: accuracy {right.float().mean():.3f}")
    fabric.print(lms.report())


def network() -> nn.Module:
    """Two convolutions and two linear layers, for images of 8x8."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(64 * 4, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10)),
    )


if __name__ == "__main__":
    main()
