"""A small residual network on images from a ``DataLoader`` with workers; nothing here knows of torchlms.

python images.py --workers 2
torchlms run --budget 80MiB images.py --workers 2
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Stripes(Dataset):
    """Noisy stripes; which way and how close they run is the class."""

    def __init__(self, count, size, classes):
        self.count, self.size, self.classes = count, size, classes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label = index % self.classes
        generator = torch.Generator().manual_seed(index)
        row = torch.linspace(0, 20, self.size)
        angle = torch.tensor(3.14 * label / self.classes)
        wave = torch.sin(row[:, None] * angle.cos() + row[None, :] * angle.sin())
        return wave + 0.5 * torch.randn(3, self.size, self.size, generator=generator), label


class Block(nn.Module):
    def __init__(self, channels, following, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, following, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(following)
        self.conv2 = nn.Conv2d(following, following, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(following)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(channels, following, 1, stride, bias=False)

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def network(classes):
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True))
    body = [Block(16, 16, 1), Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1), Block(32, 64, 2)]
    return nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--start-method", default=None, help="fork, spawn or forkserver")
    args = parser.parse_args()

    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(
        Stripes(args.images, args.size, classes=8),
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context=args.start_method if args.workers else None,
    )
    model = network(8).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for epoch in range(args.epochs):
        for step, (images, labels) in enumerate(loader):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"epoch {epoch} step {step} loss {loss.item():.9f}")


if __name__ == "__main__":
    main()
