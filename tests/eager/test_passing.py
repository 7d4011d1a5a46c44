"""Values made in passing: the same bits, made for each that asks, and gone in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from in_passing import make_in_passing
from sessions import DROPPING, more, plain_peak, run_lms, run_plain, slow_disk
from small_networks import NETWORKS, Network
from torch import Tensor, nn
from traps import STEPS, assert_same, writing

from torchlms.eager.slot import Slot, Where

DROPPERS = ["resnet", "unet3d", "transformer", "mlp"]


@pytest.fixture(autouse=True)
def moving_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_disk(monkeypatch)


@pytest.mark.parametrize("name", DROPPERS)
@pytest.mark.parametrize("seed", [None, more(1), more(2)])
def test_same_bits_within_the_budget(
    name: str, seed: int | None, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_in_passing(monkeypatch, seed)
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
    make_in_passing(monkeypatch)
    made: list[int] = []
    left: list[Where] = []
    make, make_with_passing = Slot._make, Slot._make_with_passing

    def counted(slot: Slot) -> None:
        made.append(slot.ordinal)
        make(slot)

    def watched(slot: Slot) -> None:
        assert slot.recipe is not None
        sources = [source for _, source in slot.recipe.slots.values() if source.where is Where.DROPPED]
        make_with_passing(slot)
        left.extend(source.where for source in sources)

    monkeypatch.setattr(Slot, "_make", counted)
    monkeypatch.setattr(Slot, "_make_with_passing", watched)
    stats = assert_same(chain, spill_dir, budget_bytes=1_300_000)
    assert stats["replayed_ops"]
    assert set(left) == {Where.DROPPED}
    assert max(made.count(ordinal) for ordinal in set(made)) > STEPS, "some are made more than once a step"


@pytest.mark.parametrize("drop", [True, False])
def test_random_numbers_and_writes_in_between(
    drop: bool, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn is drawn again each time, and what is written before backward is made real before."""
    make_in_passing(monkeypatch)

    def middle(model: nn.Module, x: Tensor) -> Tensor:
        x = F.silu(x) + model.shift
        for _ in range(3):
            x = F.silu(F.dropout(x, 0.3) if drop else x)
        return x

    stats = assert_same(middle, spill_dir, writing(lambda step: step % 2 == 1), budget_bytes=1_300_000)
    assert stats["replayed_ops"]
    assert any(move.passing for move in stats["plan made"].moves)  # type: ignore[attr-defined]


class Ends(nn.Module):
    """``middle`` between two narrow layers."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.enter, self.leave, self.middle = nn.Linear(16, 64), nn.Linear(64, 4), middle

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(self.middle(torch.sigmoid(self.enter(x))))
        return out


def sums(x: Tensor) -> Tensor:
    """Of which autograd saves nothing, and much is there at once."""
    parts = [x * factor for factor in range(2, 7)]
    total = parts[0] + parts[1]
    while len(parts) > 2:
        total = total + parts.pop()
    return total


def sums_of_the_last(x: Tensor) -> Tensor:
    for _ in range(7):
        x = torch.sigmoid(x)
    return torch.sigmoid(sums(x))


def sums_of_the_first(x: Tensor) -> Tensor:
    """Older than what they are added to in the end."""
    total = sums(x)
    for _ in range(7):
        x = torch.sigmoid(x)
    return torch.sigmoid(total + x)


@pytest.mark.parametrize("middle", [sums_of_the_last, sums_of_the_first])
@pytest.mark.parametrize("seed", [None, 1, 2, more(3), more(4)])
def test_no_more_than_is_foretold(
    middle: Callable[[Tensor], Tensor], seed: int | None, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last of a chain needs much to be made, and where the program made that before the chain."""
    make_in_passing(monkeypatch, seed, drop_all=True)
    network = Network(
        middle.__name__,
        lambda: Ends(middle),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
        lambda generator, size: torch.randn(size, 16, generator=generator),
        batch_size=2048,
        classes=4,
    )
    plain = run_plain(network, steps=STEPS)
    watched = run_lms(network, int(1.5 * plain_peak(network)), spill_dir, steps=STEPS, rules=DROPPING)
    assert watched.outcome.differences(plain) == []
    assert watched.plan is not None
    assert any(move.passing for move in watched.plan.moves)
    assert watched.stats["peak_device_bytes"] <= watched.stats["predicted"]["peak_device_bytes"]


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
