"""Synthetic steps of any batch size, and recorded ones."""

from __future__ import annotations

from collections import deque
from functools import cache

import torch
from tapes import GIB, MIB, Network
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchlms import LMS
from torchlms.bench.options import BenchOptions
from torchlms.core.plan import Budget
from torchlms.core.tape import Tape
from torchlms.fit.recording import Recording, record
from torchlms.fit.scale import Scale

AMPLE = Budget(device_bytes=80 * GIB, host_bytes=80 * GIB, disk_bytes=0)

# Small enough for seconds. Of the first two every saved tensor has 512 bytes at batch 2.
RECORDED = {
    "conv": BenchOptions(model="cifar10_full", image_size=16, device="cpu"),
    "transformer": BenchOptions(
        model="llama", hidden=64, layers=2, heads=2, sequence=64, vocab=100, device="cpu"
    ),
    "mnist": BenchOptions(model="mnist", device="cpu"),
}


def step(batch: int, *, layers: int = 8, fixed_s: float = 2e-5, device: str = "cuda") -> Tape:
    """Layers whose bytes and seconds grow in a line with the batch; every third has a workspace."""
    network = Network()
    last = network.layer("data", batch * MIB, fixed_s)
    for index in range(layers):
        last = network.layer(
            "aten.convolution",
            batch * (4 - index % 3) * MIB,
            fixed_s + batch * (1 + index % 2) * 1e-4,
            last,
            module=f"layer{index}",
            scratch_bytes=(8 + batch) * MIB if index % 3 == 0 else 0,
        )
    return network.tape(resident_bytes=(64 + batch) * MIB, device=device)


def scale(small: int = 2, large: int = 4) -> Scale:
    return Scale.of(step(small), step(large), small, large)


@cache
def recorded(name: str, batch: int) -> Recording:
    """A recording on the CPU, made once."""
    return record(RECORDED[name], batch, lambda line: None)


class Samples(Dataset[tuple[torch.Tensor, int]]):
    """Each made by ops of its own, as a transform would."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.linspace(0, index, 3 * 16 * 16).sin().view(3, 16, 16), index % 10


@cache
def loaded(batch: int, *, ahead: int = 0) -> Tape:
    """The tape of a loop that takes its batches from a shuffling ``DataLoader``, on the CPU. ``ahead``: how
    many batches wait beside it, as with workers that happen to have that many ready."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=3),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(40),
    )
    model(torch.zeros(1, 3, 16, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    waiting: deque[torch.Tensor] = deque(maxlen=ahead)
    with LMS(model, optimizer, device="cpu") as lms:
        for images, labels in DataLoader(Samples(8 * batch), batch, shuffle=True):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            waiting.extend(torch.zeros(images.shape) for _ in range(ahead))
    assert lms.tape is not None
    return lms.tape
