"""The largest batch: it fits, the next does not, and trying every one finds the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tapes import GIB, MIB, cpu, gpu

from tests.fit.batches import AMPLE, scale, step
from torchlms.core.machine import Machine
from torchlms.core.plan import Budget
from torchlms.fit.largest import MOST, Batches, last
from torchlms.fit.outlook import Verdict, look

SLOW = gpu(link=8e9)
DISK = Budget(device_bytes=400 * MIB, host_bytes=0, disk_bytes=GIB)


def by_trying(machine: Machine, budget: Budget, most: int = 60) -> int:
    """The last batch before the first that does not work."""
    return next(batch for batch in range(most) if not look(step(batch + 1), machine, budget).works)


@pytest.mark.parametrize(
    ("machine", "budget"),
    [
        (gpu(), replace(AMPLE, device_bytes=400 * MIB)),
        (gpu(), replace(AMPLE, device_bytes=733 * MIB)),
        (gpu(), Budget(device_bytes=600 * MIB, host_bytes=100 * MIB, disk_bytes=0)),
        (cpu(), DISK),
        (cpu(), replace(DISK, disk_bytes=60 * MIB)),
    ],
)
def test_it_is_maximal(machine: Machine, budget: Budget) -> None:
    batches = Batches(scale(), machine, budget)
    found = batches.largest()
    assert found is not None
    assert found.batch_size == by_trying(machine, budget)
    assert not batches.outlook(found.batch_size + 1).works
    assert found.samples_per_s == pytest.approx(found.batch_size / found.step_s)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_a_share_of_the_speed_is_kept_and_the_next_batch_loses_it(share: float) -> None:
    budget = replace(AMPLE, device_bytes=600 * MIB)
    batches = Batches(scale(), SLOW, budget)
    found, largest, unmoved = batches.keeping(share), batches.largest(), batches.unmoved()
    assert found is not None
    assert largest is not None
    assert unmoved is not None
    assert found.speed >= share
    assert look(step(found.batch_size + 1), SLOW, budget).speed < share
    assert unmoved.batch_size <= found.batch_size <= largest.batch_size
    speeds = [look(step(batch), SLOW, budget).speed for batch in range(1, largest.batch_size + 1)]
    assert found.batch_size == next(b for b in range(1, 60) if b >= len(speeds) or speeds[b] < share)


def test_without_moving() -> None:
    budget = replace(AMPLE, device_bytes=600 * MIB)
    found = Batches(scale(), SLOW, budget).unmoved()
    assert found is not None
    assert found.speed == 1
    assert look(step(found.batch_size), SLOW, budget).verdict is Verdict.FITS
    assert look(step(found.batch_size + 1), SLOW, budget).verdict is Verdict.MOVES


def test_not_even_one_sample() -> None:
    batches = Batches(scale(), gpu(), replace(AMPLE, device_bytes=10 * MIB))
    assert batches.largest() is batches.keeping(0.5) is batches.unmoved() is None


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 17, 64, 1000])
def test_last(limit: int) -> None:
    assert last(lambda number: number <= limit) == limit
    assert last(lambda number: number <= limit, most=40) == min(limit, 40)


def test_last_ends_where_nothing_grows() -> None:
    assert last(lambda number: True) == MOST
