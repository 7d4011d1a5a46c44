"""Synthetic tapes and machines: networks by their shape alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from torchlms.core.machine import CopyTime, Machine
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value

MIB = 1 << 20
GIB = 1 << 30


def gpu(*, link: float = 50e9, share: float = 0.92, latency_s: float = 10e-6, disk: float = 2e9) -> Machine:
    """A card on a link of ``link`` bytes per second each way."""
    sizes = [1 << power for power in range(12, 31, 3)]
    points = tuple(CopyTime(size, latency_s + size / link, latency_s + size / link) for size in sizes)
    return Machine(
        device="cuda",
        device_bytes=80 * GIB,
        torch="2.13",
        link=points,
        out_share=share,
        in_share=share,
        disk_write_bytes_per_s=disk,
        disk_read_bytes_per_s=disk,
    )


def cpu(*, disk: float = 2e9) -> Machine:
    """A machine whose device is the CPU: no link."""
    return Machine(
        device="cpu",
        device_bytes=16 * GIB,
        torch="2.13",
        disk_write_bytes_per_s=disk,
        disk_read_bytes_per_s=disk,
    )


@dataclass
class _Made:
    size_bytes: int
    birth: int
    uses: list[int] = field(default_factory=list)
    kind: Kind = Kind.ACTIVATION
    module: str = ""
    op: str = ""


class Network:
    """Layers one after the other; ``tape`` plays them forward and then backward.

    A layer reads outputs of earlier layers (by number) and saves them for its backward, in which
    gradients of the same sizes live briefly.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[str, str, int, float, tuple[int, ...], int, bool]] = []

    def layer(
        self,
        name: str,
        size_bytes: int,
        time_s: float,
        *inputs: int,
        module: str = "",
        scratch_bytes: int = 0,
        saves: bool = True,
    ) -> int:
        self._layers.append((name, module, size_bytes, time_s, inputs, scratch_bytes, saves))
        return len(self._layers) - 1

    def tape(self, *, resident_bytes: int = 0, laps: int = 1, device: str = "cuda") -> Tape:
        """``laps`` forward and backward passes one after the other, then one optimizer op."""
        ops: list[Op] = []
        made: list[_Made] = []
        for _ in range(laps):
            self._play(ops, made)
        ops.append(Op("aten._foreach_add_", "", Phase.BETWEEN, 1e-4, (), ()))
        values = tuple(self._value(index, item) for index, item in enumerate(made))
        return Tape(tuple(ops), values, resident_bytes, device, "2.13", model="synthetic")

    def _play(self, ops: list[Op], made: list[_Made]) -> None:
        outputs: list[int] = []
        for name, module, size_bytes, time_s, inputs, scratch_bytes, _ in self._layers:
            here = len(ops)
            reads = tuple(outputs[layer] for layer in inputs)
            for value in reads:
                made[value].uses.append(here)
            outputs.append(len(made))
            made.append(_Made(size_bytes, here, [here], module=module, op=name))
            ops.append(Op(name, module, Phase.FORWARD, time_s, reads, (outputs[-1],), scratch_bytes))
        gradients: dict[int, int] = {}
        for layer in range(len(self._layers) - 1, -1, -1):
            name, module, size_bytes, time_s, inputs, scratch_bytes, saves = self._layers[layer]
            here = len(ops)
            reads = [outputs[source] for source in inputs] if saves else []
            if layer in gradients:
                reads.append(gradients[layer])
            writes = []
            for source in inputs:
                if source not in gradients:
                    gradients[source] = len(made)
                    made.append(_Made(self._layers[source][2], here, kind=Kind.GRADIENT, module=module))
                writes.append(gradients[source])
            for value in (*reads, *writes):
                made[value].uses.append(here)
            ops.append(
                Op(
                    f"{name}_backward",
                    module,
                    Phase.BACKWARD,
                    2 * time_s,
                    tuple(reads),
                    tuple(writes),
                    scratch_bytes,
                )
            )

    def _value(self, index: int, item: _Made) -> Value:
        """Idle from after one use to the next, where ops lie in between."""
        uses = sorted(set(item.uses))
        idle = tuple(
            Stretch(use + 1, following)
            for use, following in pairwise(uses)
            if following - use > 2 and item.kind is Kind.ACTIVATION
        )
        return Value(
            id=index,
            kind=item.kind,
            size_bytes=item.size_bytes,
            birth=item.birth,
            death=uses[-1],
            idle=idle,
            saved=index if idle else -1,
            movable=bool(idle),
            why_not="" if idle else "never idle",
            op=item.op,
            module=item.module,
        )


def chain(length: int = 20, *, size_bytes: int = 64 * MIB, time_s: float = 2e-3) -> Tape:
    """Equal layers in a row."""
    network = Network()
    last = network.layer("data", size_bytes, time_s)
    for index in range(length):
        last = network.layer("aten.linear", size_bytes, time_s, last, module=f"layer{index}")
    return network.tape(resident_bytes=128 * MIB)


def resnet(blocks: int = 16, *, scale: float = 1.0, laps: int = 1) -> Tape:
    """Convolution, norm, relu in blocks with a sum at the end; bytes halve at each of four stages."""
    network = Network()
    last = network.layer("data", int(100 * MIB * scale), 1e-3)
    for block in range(blocks):
        stage = 4 * block // blocks
        size_bytes, entry = int(256 * MIB * scale) >> stage, last
        for part in range(3):
            module = f"layer{stage + 1}.{block}"
            last = network.layer(
                "aten.convolution",
                size_bytes,
                1.5e-3,
                last,
                module=f"{module}.conv{part}",
                scratch_bytes=16 * MIB,
            )
            last = network.layer(
                "aten.native_batch_norm", size_bytes, 4e-4, last, module=f"{module}.bn{part}"
            )
            last = network.layer("aten.relu", size_bytes, 2e-4, last, module=f"{module}.relu")
        last = network.layer("aten.add", size_bytes, 2e-4, last, entry, module=module, saves=False)
    return network.tape(resident_bytes=200 * MIB, laps=laps)


def unet(depth: int = 5, *, size_bytes: int = 512 * MIB) -> Tape:
    """Down, up, and a skip at every level: the earliest values are read twice."""
    network = Network()
    last = network.layer("data", size_bytes, 1e-3)
    skips = []
    for level in range(depth):
        last = network.layer("aten.convolution", size_bytes >> level, 6e-3, last, module=f"down{level}")
        skips.append(last)
        last = network.layer(
            "aten.max_pool2d", size_bytes >> (level + 1), 1e-3, last, module=f"down{level}.pool"
        )
    for level in reversed(range(depth)):
        last = network.layer("aten.upsample", size_bytes >> level, 1e-3, last, module=f"up{level}")
        last = network.layer(
            "aten.convolution", size_bytes >> level, 8e-3, last, skips[level], module=f"up{level}"
        )
    return network.tape(resident_bytes=100 * MIB)


def transformer(layers: int = 12, *, unit_bytes: int = 32 * MIB, laps: int = 1) -> Tape:
    """Norms, attention, and a wide feed-forward, with residual sums."""
    network = Network()
    last = network.layer("aten.embedding", unit_bytes, 2e-4)
    for layer in range(layers):
        at, entry = f"h.{layer}", last
        norm = network.layer("aten.native_layer_norm", unit_bytes, 1e-4, last, module=f"{at}.ln1")
        qkv = network.layer("aten.addmm", 3 * unit_bytes, 1.2e-3, norm, module=f"{at}.attn.qkv")
        mixed = network.layer("aten.attention", unit_bytes, 1e-3, qkv, module=f"{at}.attn")
        out = network.layer("aten.addmm", unit_bytes, 4e-4, mixed, module=f"{at}.attn.out")
        entry = network.layer("aten.add", unit_bytes, 1e-4, out, entry, module=at, saves=False)
        norm = network.layer("aten.native_layer_norm", unit_bytes, 1e-4, entry, module=f"{at}.ln2")
        wide = network.layer("aten.addmm", 4 * unit_bytes, 1.6e-3, norm, module=f"{at}.mlp.up")
        bent = network.layer("aten.gelu", 4 * unit_bytes, 2e-4, wide, module=f"{at}.mlp.act")
        down = network.layer("aten.addmm", unit_bytes, 1.6e-3, bent, module=f"{at}.mlp.down")
        last = network.layer("aten.add", unit_bytes, 1e-4, down, entry, module=at, saves=False)
    return network.tape(resident_bytes=400 * MIB, laps=laps)
