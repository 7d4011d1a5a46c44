"""A small transformer that learns to continue text, letter by letter; nothing here knows of torchlms.

python language_model.py --steps 20
torchlms run --budget 60% language_model.py --steps 20
cat book.txt | torchlms run --budget 2GiB language_model.py --text -
"""

import argparse
import math
import sys
import time

import torch
from torch import nn

PROVERB = "a plan is advice, and what happens happens; but who has a plan is seldom surprised. "


class LanguageModel(nn.Module):
    def __init__(self, letters, width, heads, layers, length):
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, letters)
        mask = torch.triu(torch.full((length, length), -math.inf), diagonal=1)
        self.register_buffer("mask", mask)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        return self.head(self.encoder(x, mask=self.mask))


def batches(text, length, batch_size, device):
    """Endless: pieces of ``text``, and the same pieces one letter on."""
    while True:
        starts = torch.randint(len(text) - length - 1, (batch_size,))
        pieces = torch.stack([text[start : start + length + 1] for start in starts.tolist()]).to(device)
        yield pieces[:, :-1], pieces[:, 1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default="", help="a file, or - for standard input")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes for each step")
    args = parser.parse_args()

    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.text == "-":
        book = sys.stdin.read()
    elif args.text:
        with open(args.text) as file:
            book = file.read()
    else:
        book = PROVERB * 100
    letters = sorted(set(book))
    text = torch.tensor([letters.index(letter) for letter in book])

    model = LanguageModel(len(letters), args.width, args.heads, args.layers, args.length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()
    data = batches(text, args.length, args.batch_size, device)
    begin = time.perf_counter()
    for step in range(1, args.steps + 1):
        total = 0.0
        for _ in range(args.accumulate):
            tokens, following = next(data)
            loss = criterion(model(tokens).flatten(0, 1), following.flatten()) / args.accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {total:.9f}")
    print(f"{(time.perf_counter() - begin) / args.steps * 1e3:.0f} ms per step", file=sys.stderr)


if __name__ == "__main__":
    main()
