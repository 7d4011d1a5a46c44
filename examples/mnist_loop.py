"""The MNIST network in a plain training loop, within a device memory budget.

    python examples/mnist_loop.py                                   # scikit-learn's 8x8 digits
    python examples/mnist_loop.py --mnist DIRECTORY --budget 96MiB  # the four files of MNIST

Without a GPU the "device" is this process's RAM under the budget, and idle values wait in a file.
"""

import argparse
import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import torchlms

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default=None if ON_GPU else "12MiB", help="such as 16GiB")
    parser.add_argument("--mnist", type=Path, help="directory with train-images-idx3-ubyte and its siblings")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()

    images, labels, test_images, test_labels = mnist(options.mnist) if options.mnist else digits()
    model = network(images.shape[-1]).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    with torchlms.LMS(model, optimizer, budget=options.budget) as lms:  # this line is all
        for epoch in range(options.epochs):
            model.train()
            for batch in torch.randperm(len(images)).split(options.batch_size):
                loss = F.cross_entropy(model(images[batch].to(DEVICE)), labels[batch].to(DEVICE))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            print(f"epoch {epoch + 1}: accuracy {accuracy(model, test_images, test_labels):.3f}")
    print(lms.report())


def network(edge: int) -> nn.Module:
    """Two convolutions and two linear layers, for images of ``edge`` times ``edge``."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(64 * (edge // 4) ** 2, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10)),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    right = [
        model(some.to(DEVICE)).argmax(1).cpu() == truth
        for some, truth in zip(images.split(256), labels.split(256), strict=True)
    ]
    return torch.cat(right).float().mean().item()


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
