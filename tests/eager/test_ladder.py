"""The ladder over a made-up population: who goes first, when to stop, and what to say when nobody is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torchlms.eager.ladder import EVERYTHING_BYTES, Ladder, asked_bytes, starved_engine
from torchlms.eager.sizes import ResultSizes
from torchlms.eager.slot import Where
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall
from torchlms.memory.device import CpuDevice
from torchlms.memory.ledger import Ledger

MIB = 1 << 20
aten = torch.ops.aten


class FakeSlot:
    """A value of some size in some state; leaving gives its bytes back to the ledger."""

    def __init__(self, house: House, name: str, size_bytes: int, *, held: bool = False) -> None:
        self.house, self.name, self.size_bytes, self.held = house, name, size_bytes, held
        self.where = Where.HELD
        self.place: Any = None
        house.ledger.live_bytes += size_bytes

    def alone(self) -> bool:
        return not self.held and self.where is Where.HELD

    def send(self, place: Any) -> None:
        self.house.log.append(f"send {self.name}")
        self.place = place

    def _go(self, verb: str) -> None:
        self.house.log.append(f"{verb} {self.name}")
        self.where = Where.AWAY
        self.house.ledger.live_bytes -= self.size_bytes

    def release(self) -> None:
        assert self.place is not None
        self._go("release")

    def turn_back(self) -> None:
        self._go("turn back")


class House:
    """Population, store and ledger in one."""

    def __init__(self, budget_bytes: int) -> None:
        self.ledger = Ledger()
        self.slots: list[FakeSlot] = []
        self.spares: list[FakeSlot] = []
        self.log: list[str] = []
        self.room_bytes = 1 << 40
        self.ladder = Ladder(CpuDevice(self.ledger), self, self, ResultSizes(), budget_bytes)  # type: ignore[arg-type]

    def add(self, name: str, size_bytes: int, **state: Any) -> FakeSlot:
        self.slots.append(FakeSlot(self, name, size_bytes, **state))
        return self.slots[-1]

    def living(self) -> Iterator[Any]:
        yield from self.slots

    def spare(self) -> Iterator[Any]:
        yield from self.spares

    def may_lend(self, slot: Any) -> bool:
        return False

    def place(self, size_bytes: int) -> object:
        if size_bytes > self.room_bytes:
            raise HostBudgetTooSmall("no room", missing_bytes=size_bytes - self.room_bytes)
        return object()


def test_large_before_small_and_oldest_first() -> None:
    house = House(100 * MIB)
    for name, size_bytes in [("small1", 100), ("big1", 2 * MIB), ("small2", 200), ("big2", 3 * MIB)]:
        house.add(name, size_bytes)
    assert house.ladder.reclaim(1 << 60) == 5 * MIB + 300
    order = [line.split()[1] for line in house.log if line.startswith("release")]
    assert order == ["big1", "big2", "small1", "small2"]


def test_what_is_leaving_goes_first_then_what_came_early() -> None:
    house = House(100 * MIB)
    house.add("idle", 2 * MIB)
    coming = house.add("coming", 2 * MIB)
    coming.where, coming.place = Where.COMING, object()
    leaving = house.add("leaving", 2 * MIB)
    leaving.place = object()
    house.ladder.reclaim(6 * MIB)
    assert house.log == ["release leaving", "turn back coming", "send idle", "release idle"]


def test_what_only_recipes_will_read_goes_last() -> None:
    house = House(100 * MIB)
    house.spares.append(FakeSlot(house, "spare", 5 * MIB))
    house.spares.append(FakeSlot(house, "read just now", 5 * MIB, held=True))
    house.add("saved", 100)
    assert house.ladder.reclaim(5 * MIB) == 5 * MIB + 100
    assert house.log == ["send saved", "release saved", "send spare", "release spare"]


@pytest.mark.parametrize("garbage", ["of its own", "none"])
def test_what_only_garbage_held_leaves_before_anything_is_refused(garbage: str) -> None:
    """A collection that frees nothing itself: the slot still has the bytes, but nobody else."""
    house = House(100 * MIB)
    for name in ("first", "second"):
        house.add(name, 45 * MIB, held=True)

    def collect() -> None:
        for slot in house.slots:
            slot.held = False

    house.ladder._collect = collect
    house.ladder.begin_step()
    if garbage == "none":  # which makes collections rare, but not before a refusal
        house.ladder._collect_from = 1000
    kwargs = {"size": [60 * MIB // 4], "device": torch.device("cpu")}
    house.ladder.enter_in_ledger(aten.empty.memory_format, (kwargs.pop("size"),), kwargs, lambda: "")
    assert [line for line in house.log if line.startswith("release")] == ["release first", "release second"]


def test_it_stops_when_there_is_enough() -> None:
    house = House(100 * MIB)
    for index in range(5):
        house.add(str(index), 2 * MIB)
    assert house.ladder.reclaim(3 * MIB) == 4 * MIB
    assert [slot.where for slot in house.slots].count(Where.AWAY) == 2
    assert (house.ladder.reclaims, house.ladder.reclaimed_bytes) == (1, 4 * MIB)


def test_what_others_hold_stays() -> None:
    house = House(100 * MIB)
    house.add("held", 2 * MIB, held=True)
    away = house.add("away", 2 * MIB)
    away.where = Where.AWAY
    assert house.ladder.reclaim(1) == 0
    assert house.log == []
    assert house.ladder.reclaims == 0


def test_fit_makes_exactly_the_room_that_is_missing() -> None:
    house = House(10 * MIB)
    for index in range(4):
        house.add(str(index), 2 * MIB)
    assert house.ladder.fit(2 * MIB)
    assert house.log == []
    assert house.ladder.fit(3 * MIB)
    assert house.log == ["send 0", "release 0"]
    assert house.ladder.fit(10 * MIB)
    assert not house.ladder.fit(10 * MIB + 1)


def test_the_collector_looks_once_more_before_an_op_is_refused() -> None:
    """However often it found nothing: what lies in a cycle now may be what is missing."""
    house = House(10 * MIB)
    house.add("held", 8 * MIB, held=True)
    looks = []
    house.ladder._collect = lambda: looks.append(1)
    x = torch.ones(MIB)

    def make(where: str = "") -> None:
        house.ladder.enter_in_ledger(torch.ops.aten.exp.default, (x,), {}, lambda: where)

    for tries in range(1, 4):
        with pytest.raises(BudgetTooSmall):
            make()
        assert len(looks) >= tries
    before = len(looks)
    assert not house.ladder.fit(4 * MIB)
    assert len(looks) == before, "no op is refused yet"

    def free() -> None:
        house.ledger.live_bytes -= house.slots.pop().size_bytes

    house.ladder._collect = free
    make()


def test_a_full_disk_lets_smaller_values_pass() -> None:
    house = House(100 * MIB)
    house.room_bytes = 3 * MIB
    house.add("too big", 4 * MIB)
    house.add("fits", 2 * MIB)
    assert house.ladder.reclaim(1) == 2 * MIB
    with pytest.raises(HostBudgetTooSmall):
        house.ladder.reclaim(1)


def test_the_refusal_names_op_module_bytes_and_smallest_budget() -> None:
    house = House(10 * MIB)
    house.add("held", 8 * MIB, held=True)
    x = torch.zeros(MIB // 2)  # 2 MiB
    with pytest.raises(BudgetTooSmall) as raised:
        house.ladder.enter_in_ledger(aten.cat.default, ([x, x],), {}, lambda: "layer1.conv")
    text = str(raised.value)
    for part in (
        "aten.cat.default",
        "in layer1.conv",
        "2.0 MiB of operands",
        "4.0 MiB of results",
        "10.0 MiB",
    ):
        assert part in text
    assert raised.value.smallest_bytes == 12 * MIB
    assert f"smallest budget that works is at least 12.0 MiB ({12 * MIB} bytes)" in text


def test_what_fits_or_returns_nothing_new_is_let_in() -> None:
    house = House(10 * MIB)
    house.add("held", 8 * MIB, held=True)
    x = torch.zeros(MIB // 4)

    def nowhere() -> str:
        raise AssertionError("nobody needs to know")

    house.ladder.enter_in_ledger(aten.neg.default, (x,), {}, nowhere)
    house.ladder.enter_in_ledger(aten.view.default, (x, [-1]), {}, nowhere)
    house.add("more", 3 * MIB, held=True)
    house.ladder.enter_in_ledger(aten.neg_.default, (x,), {}, nowhere)


def test_no_way_back_says_so() -> None:
    house = House(10 * MIB)
    house.add("held", 8 * MIB, held=True)
    assert house.ladder.allocate(2 * MIB).numel() == 2 * MIB
    with pytest.raises(BudgetTooSmall, match="must come back for backward") as raised:
        house.ladder.allocate(4 * MIB)
    assert raised.value.smallest_bytes == 12 * MIB


@pytest.mark.parametrize("early", [True, False])
def test_what_lies_in_cycles_makes_way_for_a_value_that_is_needed_now(early: bool) -> None:
    """The collector had looked in this step already: it looks again before a refusal, if that would hurt."""
    house = House(10 * MIB)
    house.add("in use", 6 * MIB, held=True)
    garbage_bytes = [0, 3 * MIB]

    def collect() -> None:
        house.ledger.live_bytes -= garbage_bytes.pop(0)

    house.ledger.live_bytes += 3 * MIB
    house.ladder._collect = collect
    assert not house.ladder.reclaim(MIB)
    if early:
        with pytest.raises(BudgetTooSmall):
            house.ladder.allocate(2 * MIB, early=True)
        assert garbage_bytes
    else:
        assert house.ladder.allocate(2 * MIB).numel() == 2 * MIB
        assert not garbage_bytes


def test_the_smallest_budget_is_always_more_than_what_was_given() -> None:
    house = House(10 * MIB)
    x = torch.zeros(4)
    assert house.ladder.refusals.op(aten.neg.default, (x,), {}, "", 16, 10 * MIB).smallest_bytes > 11 * MIB


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total", int(1.5 * (1 << 30)) + 1),
        ("Tried to allocate 20.00 MiB (GPU 0; ...)", 20 * MIB + 1),
        ("Tried to allocate 512 bytes", 513),
        ("out of memory", 0),
    ],
)
def test_how_much_was_asked_for(text: str, size_bytes: int) -> None:
    assert asked_bytes(torch.OutOfMemoryError(text)) == size_bytes


def test_what_keeps_memory_in_order_goes_before_any_value() -> None:
    house = House(10 * MIB)
    house.add("value", 4 * MIB)
    house.add("in use", 4 * MIB, held=True)
    house.ledger.live_bytes += 2 * MIB
    fillers_bytes = [2 * MIB]

    def give_back() -> int:
        given = fillers_bytes.pop() if fillers_bytes else 0
        house.ledger.live_bytes -= given
        return given

    house.ladder._give_back = give_back
    assert house.ladder.allocate(2 * MIB).numel() == 2 * MIB
    assert not house.log
    assert house.ladder.reclaims == 0
    assert house.ladder.allocate(6 * MIB).numel() == 6 * MIB
    assert house.log == ["send value", "release value"]


def test_everything_that_can_leave_is_more_than_what_keeps_memory_in_order() -> None:
    house = House(10 * MIB)
    house.add("value", 4 * MIB)
    house.ladder._give_back = lambda: 2 * MIB
    assert house.ladder.reclaim(EVERYTHING_BYTES) == 6 * MIB
    assert house.log == ["send value", "release value"]


def test_the_words_of_a_starved_engine() -> None:
    assert starved_engine(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert starved_engine(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not starved_engine(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_an_op_is_run_again_after_each_eviction() -> None:
    """As on a device that can run out inside an op: room, rewind, retry, until nothing is left."""
    house = House(100 * MIB)
    house.add("one", 70 * MIB)
    house.add("two", 70 * MIB)
    tries: list[int] = []
    rewound: list[int] = []

    def hungry(x: torch.Tensor) -> torch.Tensor:
        tries.append(house.ledger.live_bytes)
        if len(tries) < 2:
            raise torch.OutOfMemoryError("Tried to allocate 65.00 MiB")
        return x + 1

    x = torch.zeros(3)
    result = house.ladder.retry(hungry, (x,), {}, str, 1, lambda: rewound.append(1))
    assert torch.equal(result, x + 1)
    assert tries == [70 * MIB, 0]
    assert len(rewound) == 2
    assert house.ladder.retries == 2

    tries.clear()
    with pytest.raises(BudgetTooSmall):
        house.ladder.retry(aten.neg.default, (x,), {}, str, 1)


def test_room_is_made_without_writing_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a program asks for deterministic algorithms ``torch.empty`` writes over all that it returns,
    which takes as long as an op for the blocks of a large convolution."""
    house = House(8 * MIB)
    monkeypatch.setattr(torch, "empty", _empty_only)
    torch.use_deterministic_algorithms(True)
    try:
        made = house.ladder.allocate(3 * MIB)
        assert house.ladder.reserve((MIB, 2 * MIB))
    finally:
        torch.use_deterministic_algorithms(False)
    assert made.untyped_storage().nbytes() == made.numel() == 3 * MIB


def _empty_only(*size: int, **options: Any) -> torch.Tensor:
    assert size == (0,), "written over, if it had been for large blocks"
    return torch.zeros(0, **options)
