"""Synthetic steps of any batch size, and recorded ones."""

from __future__ import annotations

from functools import cache

from tapes import GIB, MIB, Network

from torchlms.bench.options import BenchOptions
from torchlms.core.plan import Budget
from torchlms.core.tape import Tape
from torchlms.fit.recording import Recording, record
from torchlms.fit.scale import Scale

AMPLE = Budget(device_bytes=80 * GIB, host_bytes=80 * GIB, disk_bytes=0)

# Small enough for seconds, large enough that every saved tensor has 512 bytes at batch 2.
RECORDED = {
    "conv": BenchOptions(model="cifar10_full", image_size=16, device="cpu"),
    "transformer": BenchOptions(
        model="llama", hidden=64, layers=2, heads=2, sequence=64, vocab=100, device="cpu"
    ),
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
