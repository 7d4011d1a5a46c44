"""A small convolutional network that learns to read digits; nothing here knows of torchlms.

The digits come with scikit-learn; without it, they are drawn by a formula.

    python digits.py --epochs 2
    torchlms run --budget 60MiB digits.py --epochs 2
"""

import argparse

import torch
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 32, 3, padding=1)
        self.dropout = nn.Dropout(0.25)
        self.hidden = nn.Linear(32 * 14 * 14, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, x):
        x = functional.relu(self.conv1(x))
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.relu(self.conv3(x))
        x = functional.relu(self.hidden(self.dropout(x).flatten(1)))
        return functional.log_softmax(self.output(x), dim=1)


def load_digits():
    """Images of 28x28 and the digits on them."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        labels = torch.arange(1797) % 10
        rows = torch.linspace(0, 6.28, 28)
        angles = labels[:, None, None] * (rows[:, None] + rows[None, :] / 2)
        images = (torch.sin(angles)[:, None] + 1) / 2
        return images + 0.3 * torch.rand(images.shape), labels
    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return functional.interpolate(images, size=28, mode="bilinear"), torch.tensor(digits.target)


def train(model, device, images, labels, optimizer, epoch, batch_size):
    model.train()
    for step, picked in enumerate(torch.randperm(len(images)).split(batch_size)):
        data, target = images[picked].to(device), labels[picked].to(device)
        optimizer.zero_grad()
        loss = functional.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        print(f"epoch {epoch} step {step} loss {loss.item():.9f}")


def test(model, device, images, labels):
    model.eval()
    with torch.no_grad():
        right = (model(images.to(device)).argmax(dim=1).cpu() == labels).sum().item()
    print(f"test: {right} of {len(labels)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-model", default="")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = load_digits()
    model = Net().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(1, args.epochs + 1):
        train(model, device, images[:-256], labels[:-256], optimizer, epoch, args.batch_size)
        test(model, device, images[-256:], labels[-256:])
        scheduler.step()
    if args.save_model:
        torch.save(model.state_dict(), args.save_model)


if __name__ == "__main__":
    main()
