"""A deep residual network that learns a function of ten numbers; nothing here knows of torchlms.

The function is Friedman's first, a customary one for such tests, with some noise.

python regression.py --epochs 2
torchlms run --budget 60% regression.py --epochs 2
"""

import argparse
import math

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.outer.weight)  # each block begins as a way through

    def forward(self, x):
        return x + self.dropout(self.outer(nn.functional.silu(self.inner(self.norm(x)))))


def make_model(width, blocks, dropout):
    body = [Block(width, dropout) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(10, width), *body, nn.LayerNorm(width), nn.Linear(width, 1))


def draw(rows):
    """Ten numbers a row, and what is to be learned of them."""
    x = torch.rand(rows, 10)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return x, (y - 14.4) / 5 + 0.2 * torch.randn(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=0.001)
    args = parser.parse_args()

    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y = draw(args.rows)
    held_out = draw(512)
    model = make_model(args.width, args.blocks, args.dropout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for step, picked in enumerate(torch.randperm(args.rows).split(args.batch_size), start=1):
            guess = model(x[picked].to(device)).squeeze(1)
            loss = nn.functional.mse_loss(guess, y[picked].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"epoch {epoch} step {step} loss {loss.item():.9f}")
        scheduler.step()
        model.eval()
        with torch.no_grad():
            error = nn.functional.mse_loss(model(held_out[0].to(device)).squeeze(1), held_out[1].to(device))
        print(f"epoch {epoch}: off by {error.sqrt().item():.6f}")


if __name__ == "__main__":
    main()
