"""Rivals give the plain run's losses, cut models where they should, and the ledger counts everything."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from torchlms.bench.blocks import Checkpointed, checkpoint_blocks
from torchlms.bench.networks import NETWORKS, NetworkOptions, get_network
from torchlms.bench.options import RIVALS, BenchOptions, Way, parse_ways
from torchlms.bench.peak import plain_peak_bytes
from torchlms.bench.runner import run
from torchlms.bench.ways import apply_way, cap_bytes
from torchlms.bench.workload import Workload, make_workload
from torchlms.errors import BadOption, NotSupported

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


def made(model: str, way: Way, **sizes: int) -> Workload:
    network = get_network(model)
    options = BenchOptions(model=model, batch_size=2, device="cpu", way=way, **sizes)  # type: ignore[arg-type]
    workload = make_workload(network, options.resolve(network))
    apply_way(workload, way)
    return workload


def losses(workload: Workload) -> list[str]:
    return [float(workload.step().item()).hex() for _ in range(3)]


@pytest.mark.parametrize("way", [Way.SAVE_ON_CPU, Way.CHECKPOINT, Way.CHECKPOINT_OFFLOAD])
@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("mnist", {}),
        ("cifar10_full", {}),
        ("llama", {"hidden": 32, "layers": 2, "heads": 2, "sequence": 8, "vocab": 50}),
        ("unet3d", {"image_size": 16, "width": 4}),
    ],
)
def test_rivals_train_to_the_same_losses(model: str, sizes: dict[str, int], way: Way) -> None:
    assert losses(made(model, way, **sizes)) == losses(made(model, Way.NONE, **sizes))


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet50", 16), ("resnet152", 50), ("googlenet", 9), ("llama", 3), ("unet3d", 7)]
)
def test_blocks_are_found(name: str, blocks: int) -> None:
    options = NetworkOptions(batch_size=1, image_size=64, hidden=32, layers=3, heads=2, sequence=4, vocab=9)
    with torch.device("meta"):
        model = NETWORKS[name].factory(options)
    assert isinstance(model, nn.Module)
    weights = sum(weight.numel() for weight in model.parameters())
    assert checkpoint_blocks(model) == blocks
    assert sum(weight.numel() for weight in model.parameters()) == weights


def test_a_plain_sequential_is_cut_before_layers_with_weights() -> None:
    relu = nn.ReLU(inplace=True)  # one object in eight places, as many models have it
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(4, 4), relu]
    model = nn.Sequential(*layers)
    assert checkpoint_blocks(model) == 4
    for piece in model.children():
        assert isinstance(piece, Checkpointed)
        assert isinstance(piece.block, nn.Sequential)
        assert isinstance(piece.block[0], nn.Linear)


def test_nothing_to_cut_is_said() -> None:
    with pytest.raises(NotSupported, match="Linear has no chain"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_a_wrapped_block_still_answers_for_its_own_attributes() -> None:
    block = nn.Linear(3, 5)
    wrapped = Checkpointed(block, contextlib.nullcontext)
    assert wrapped.out_features == 5
    with pytest.raises(AttributeError):
        _ = wrapped.no_such_thing


def test_ledger_peak_by_hand() -> None:
    edge, rows = 64, 32
    weight_bytes = 4 * (edge * edge + edge)

    def make() -> Workload:
        torch.manual_seed(0)
        model = nn.Linear(edge, edge)
        return Workload(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            torch.randn(rows, edge),
            torch.randn(rows, edge),
            lambda output, target: (output - target).square().mean(),
            CPU,
        )

    peak_bytes = plain_peak_bytes(make)
    activation_bytes = 4 * rows * edge
    # Weights, momentum and gradients; input and target; a few activations, however torch orders them.
    assert 3 * weight_bytes + 2 * activation_bytes <= peak_bytes
    assert peak_bytes <= 4 * weight_bytes + 8 * activation_bytes


def test_checkpointing_lowers_the_ledger_peak() -> None:
    sizes = {"hidden": 32, "layers": 6, "heads": 2, "sequence": 64, "vocab": 50}
    plain = plain_peak_bytes(lambda: made("llama", Way.NONE, **sizes))
    assert plain_peak_bytes(lambda: made("llama", Way.CHECKPOINT, **sizes)) < 0.8 * plain


def test_ways_are_parsed() -> None:
    assert parse_ways("none, checkpoint,none") == (Way.NONE, Way.CHECKPOINT)
    assert parse_ways("") == ()
    with pytest.raises(BadOption, match=r"--compare lms: choose from none, none_capped"):
        parse_ways("lms")
    assert Way.LMS not in RIVALS


def test_caps_need_cuda() -> None:
    assert cap_bytes(BenchOptions(way=Way.NONE), CPU) is None
    assert cap_bytes(BenchOptions(way=Way.NONE, cap="none"), CPU) is None
    with pytest.raises(NotSupported, match="1GiB"):
        cap_bytes(BenchOptions(way=Way.NONE, cap="1GiB"), CPU)
    with pytest.raises(BadOption, match="none_capped needs"):
        cap_bytes(BenchOptions(way=Way.NONE_CAPPED), CPU)


@pytest.mark.parametrize("model", ["cifar10_full", "mnist"])
def test_the_plain_ledger_agrees_with_the_one_of_lms(model: str, spill_dir: Path) -> None:
    options = BenchOptions(
        model=model, batch_size=8, num_batches=2, device="cpu", budget="1GiB", disk_dir=str(spill_dir)
    )
    ours = run(options, lambda line: None)
    plain = run(replace(options, way=Way.NONE, budget=None), lambda line: None)
    assert ours.stats["state"] == "guard"
    # LMS holds a few scalars of its own, and sees some tensors an op later.
    assert ours.peak_device_bytes == pytest.approx(plain.peak_device_bytes, rel=0.02)
    assert [s.loss for s in ours.steps[:5]] == [s.loss for s in plain.steps]
