"""Values made in passing: the same bits, made for each that asks, and gone in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from in_passing import make_all_in_passing
from sessions import DROPPING, plain_peak, run_lms, run_plain, slow_disk
from small_networks import NETWORKS, Network
from torch import Tensor, nn
from traps import STEPS, Trap, assert_same, batch

from torchlms.eager.slot import Slot, Where

DROPPERS = ["resnet", "unet3d", "transformer", "mlp"]


@pytest.fixture(autouse=True)
def moving_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_disk(monkeypatch)


@pytest.mark.parametrize("name", DROPPERS)
def test_same_bits_within_the_budget(name: str, spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_all_in_passing(monkeypatch)
    network = NETWORKS[name]
    budget_bytes = int(0.5 * plain_peak(network))
    watched = run_lms(network, budget_bytes, spill_dir, steps=STEPS, rules=DROPPING)
    assert watched.outcome.differences(run_plain(network, steps=STEPS)) == []
    assert watched.plan is not None
    assert any(move.passing for move in watched.plan.moves)
    assert watched.peak_bytes <= budget_bytes
    predicted_bytes = watched.stats["predicted"]["peak_device_bytes"]
    assert 0.97 * predicted_bytes <= watched.stats["peak_device_bytes"] <= predicted_bytes


def chain(model: nn.Module, x: Tensor) -> Tensor:
    """Each made from the one before, and all saved."""
    for _ in range(6):
        x = F.silu(x)
    return x


def test_it_is_gone_while_others_are_there(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever something has been made again, what that was made from in passing is dropped."""
    make_all_in_passing(monkeypatch)
    made: list[tuple[int, set[Where]]] = []
    remake = Slot._remake

    def watched(slot: Slot) -> None:
        recipe = slot.recipe
        assert recipe is not None
        sources = [source for _, source in recipe.slots.values() if source.where is Where.DROPPED]
        remake(slot)
        made.append((slot.ordinal, {source.where for source in sources if source.passing}))

    monkeypatch.setattr(Slot, "_remake", watched)
    stats = assert_same(chain, spill_dir, budget_bytes=1_300_000)
    assert stats["replayed_ops"]
    assert {Where.DROPPED} in [wheres for _, wheres in made]
    assert all(wheres <= {Where.DROPPED} for _, wheres in made)
    ordinals = [ordinal for ordinal, _ in made]
    assert max(ordinals.count(ordinal) for ordinal in set(ordinals)) > STEPS, "some are made more than once"


@pytest.mark.parametrize("drop", [True, False])
def test_random_numbers_and_writes_in_between(
    drop: bool, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn is drawn again each time, and what is written before backward is made real before."""
    make_all_in_passing(monkeypatch)

    def middle(model: nn.Module, x: Tensor) -> Tensor:
        x = F.silu(x) + model.shift
        for _ in range(3):
            x = F.silu(F.dropout(x, 0.3) if drop else x)
        return x

    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        if step % 2:
            with torch.no_grad():
                model.shift.add_(0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach()).hex()

    stats = assert_same(middle, spill_dir, loop, budget_bytes=1_300_000)
    assert stats["replayed_ops"]
    assert any(move.passing for move in stats["plan made"].moves)  # type: ignore[attr-defined]


class Stem(nn.Module):
    """Two values at full resolution, one made of the other, before a rest that works on a quarter of that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.rest = nn.Sequential(
            *[layer for _ in range(9) for layer in (nn.Conv2d(64, 64, 3, padding=1, groups=8), nn.ReLU())]
        )
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x)), inplace=True), 2)
        return self.head(self.rest(x).mean((2, 3)))


def test_the_planner_makes_a_stem_twice(spill_dir: Path) -> None:
    """Where there is no room for both of them and their gradients, nor for one of them beside the rest."""
    network = Network(
        "stem",
        Stem,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
        lambda generator, size: torch.randn(size, 3, 64, 64, generator=generator),
        batch_size=4,
        classes=5,
    )
    budget_bytes = int(0.63 * plain_peak(network))
    rules = {**DROPPING, "keep_modules": ("rest",)}
    watched = run_lms(network, budget_bytes, spill_dir, steps=STEPS, rules=rules)
    assert watched.outcome.differences(run_plain(network, steps=STEPS)) == []
    assert watched.plan is not None
    assert watched.tape is not None
    passing = [watched.tape.values[move.value] for move in watched.plan.moves if move.passing]
    assert [value.module for value in passing] == ["conv"]
    assert watched.peak_bytes <= budget_bytes
    predicted_bytes = watched.stats["predicted"]["peak_device_bytes"]
    assert 0.97 * predicted_bytes <= watched.stats["peak_device_bytes"] <= predicted_bytes
