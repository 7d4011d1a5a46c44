"""A slot's life: out, away, back, and its end, with copies that end late and memory that is reused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from torchlms.eager.owner import SlotOwner
from torchlms.eager.saved import Saved, memoryless_alias
from torchlms.eager.slot import Slot, Where, find, link
from torchlms.errors import SpillError

SIZE = 4096


class LateCopy:
    """Moves its bytes only when it is waited for, as a copy that has just been queued would."""

    def __init__(self, source: Any, target: Any, log: list[str], name: str, after: Any = None) -> None:
        self.source, self.target, self.log, self.name, self.after = source, target, log, name, after
        self.error: Exception | None = None
        self.ended = False

    def wait(self) -> None:
        self.log.append(f"wait {self.name}")
        if self.error is not None:
            raise self.error
        if not self.ended:
            if self.after is not None:
                self.after.wait()
            self.target.copy_(self.source)
            self.ended = True
            self.source = self.target = None

    def done(self) -> bool:
        return self.ended


class FakePlace:
    def __init__(self, log: list[str]) -> None:
        self.bytes = torch.zeros(SIZE, dtype=torch.uint8)
        self.size_bytes = SIZE
        self.log = log
        self.freed = 0

    def free(self) -> None:
        self.log.append("free")
        self.freed += 1


class FakeOwner(SlotOwner):
    def __init__(self) -> None:
        self.log: list[str] = []
        self.copies: list[LateCopy] = []
        self.orphans: list[Any] = []
        self.refuse: BaseException | None = None
        self.interrupt = False  # the next copy back, once it is under way

    def allocate(self, size_bytes: int, *, early: bool = False) -> Tensor:
        if self.refuse is not None:
            raise self.refuse
        self.log.append("allocate")
        return torch.full((size_bytes,), 0xEE, dtype=torch.uint8)

    def start_out(self, source: Tensor, place: Any) -> Any:
        if self.refuse is not None:
            raise self.refuse
        self.copies.append(LateCopy(source, place.bytes, self.log, "out"))
        return self.copies[-1]

    def start_in(self, place: Any, target: Tensor, after: Any) -> Any:
        self.copies.append(LateCopy(place.bytes, target, self.log, "in", after))
        if self.interrupt:
            self.interrupt = False
            raise KeyboardInterrupt
        return self.copies[-1]

    def finish_copies(self) -> None:
        self.log.append("finish copies")
        for copy in self.copies:
            copy.wait()

    def leaving(self, slot: Slot) -> None:
        assert slot.bytes is not None
        assert all(copy.ended for copy in self.copies), "let go with a copy in flight"
        self.log.append("leaving")

    def moved(self, slot: Slot) -> None:
        self.log.append(f"moved {slot.where.value}")

    def back(self, slot: Slot) -> None:
        assert slot.where is Where.HELD
        self.log.append("back")

    def forget(self, slot: Slot) -> None:
        self.log.append("forget")

    def adopt(self, orphan: Any) -> None:
        self.orphans.append(orphan)


@pytest.fixture
def owner() -> FakeOwner:
    return FakeOwner()


def new_slot(owner: FakeOwner) -> tuple[Slot, Tensor]:
    """A slot, and what its bytes must be at the end. Nobody else holds the storage."""
    pattern = torch.arange(SIZE, dtype=torch.int64).mul(37).to(torch.uint8)
    return Slot(owner, pattern.clone(), 3), pattern


class Mark:
    """Dies with the storage that it is tied to."""


def watch(slot: Slot) -> weakref.ref[Mark]:
    assert slot.bytes is not None
    mark = Mark()
    slot.bytes.untyped_storage().tie = mark  # type: ignore[attr-defined]
    return weakref.ref(mark)


def send(slot: Slot, owner: FakeOwner) -> FakePlace:
    place = FakePlace(owner.log)
    slot.send(place)  # type: ignore[arg-type]
    return place


def taken(slot: Slot) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(slot.take(), 0, (SIZE,), (1,))  # type: ignore[call-overload,no-any-return]


def test_out_and_back(owner: FakeOwner) -> None:
    slot, pattern = new_slot(owner)
    assert slot.alone()
    place = send(slot, owner)
    assert slot.where is Where.HELD
    lives = watch(slot)
    slot.release()
    assert slot.where is Where.AWAY
    assert slot.bytes is None
    assert lives() is None, "the memory was not given back"
    slot.fetch()
    assert slot.where is Where.COMING
    assert torch.equal(taken(slot), pattern)
    assert slot.where is Where.HELD
    assert place.freed == 1
    assert owner.log == [
        "wait out",
        "leaving",
        "moved away",
        "allocate",
        "moved coming",
        "wait out",
        "wait in",
        "wait out",
        "back",
        "free",
    ]


def test_taken_while_away_comes_back_at_once(owner: FakeOwner) -> None:
    slot, pattern = new_slot(owner)
    send(slot, owner)
    slot.release()
    assert torch.equal(taken(slot), pattern)


def test_taken_before_it_left(owner: FakeOwner) -> None:
    """The copy elsewhere is not theirs any more once somebody may write to the bytes."""
    slot, pattern = new_slot(owner)
    place = send(slot, owner)
    bytes_ = taken(slot)
    assert torch.equal(bytes_, pattern)
    assert slot.place is None
    assert place.freed == 1
    bytes_.fill_(5)
    assert not slot.alone()
    assert int(taken(slot)[0]) == 5
    del bytes_
    assert slot.alone()


def test_turned_back_and_fetched_again(owner: FakeOwner) -> None:
    slot, pattern = new_slot(owner)
    place = send(slot, owner)
    slot.release()
    for _ in range(3):
        slot.fetch()
        slot.turn_back()
        assert slot.where is Where.AWAY
        assert slot.bytes is None
    assert place.freed == 0
    assert torch.equal(taken(slot), pattern)


def test_interrupted_with_the_copy_back_under_way(owner: FakeOwner) -> None:
    """The memory that it writes to is given up only when it has ended, and the next one brings the bytes."""
    slot, pattern = new_slot(owner)
    place = send(slot, owner)
    slot.release()
    owner.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        slot.fetch()
    assert owner.copies[-1].ended
    assert slot.where is Where.AWAY
    assert (slot.copy_in, slot.bytes) == (None, None)
    assert place.freed == 0
    assert torch.equal(taken(slot), pattern)
    assert place.freed == 1


def test_others_keep_it_here(owner: FakeOwner) -> None:
    slot, _ = new_slot(owner)
    assert slot.bytes is not None
    view = slot.bytes[3:5]
    assert not slot.alone()
    held = view.untyped_storage()
    del view
    assert not slot.alone()  # who holds the storage's Python object can read and write the bytes
    del held
    assert slot.alone()
    send(slot, owner)
    slot.release()
    assert not slot.alone()


def test_the_storage_knows_its_slot(owner: FakeOwner) -> None:
    slot, _ = new_slot(owner)
    assert slot.bytes is not None
    other = slot.bytes.view(torch.float32)
    assert find(other.untyped_storage(), owner) is slot
    assert find(other.untyped_storage(), FakeOwner()) is None
    assert find(torch.empty(3).untyped_storage(), owner) is None
    del other
    send(slot, owner)
    slot.release()
    storage = slot.take()
    assert find(storage, owner) is slot
    del slot
    assert find(storage, owner) is None
    link(storage, new_slot(owner)[0])  # which dies at once
    assert find(storage, owner) is None


def test_its_end_while_away(owner: FakeOwner) -> None:
    slot, _ = new_slot(owner)
    place = send(slot, owner)
    slot.release()
    del slot
    assert place.freed == 1
    assert owner.log[-1] in ("free", "forget")
    assert "forget" in owner.log
    assert owner.orphans == []


@pytest.mark.parametrize("coming", [False, True])
def test_its_end_with_a_copy_in_flight(coming: bool, owner: FakeOwner) -> None:
    """A finalizer may run anywhere, so it waits for nothing; the bytes live on until the engine comes by."""
    slot, pattern = new_slot(owner)
    place = send(slot, owner)
    if coming:
        slot.release()
        slot.fetch()
    waits = owner.log.count("wait out") + owner.log.count("wait in")
    lives = watch(slot)
    del slot
    gc.collect()
    assert owner.log.count("wait out") + owner.log.count("wait in") == waits
    assert place.freed == 0
    assert "forget" in owner.log
    assert lives() is not None, "given back under a copy"
    (orphan,) = owner.orphans
    orphan.bury()
    assert place.freed == 1
    assert torch.equal(place.bytes, pattern)
    assert lives() is None


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_copy_of_a_dead_value_is_nobodys_concern(owner: FakeOwner) -> None:
    slot, _ = new_slot(owner)
    place = send(slot, owner)
    owner.copies[0].error = SpillError(28, "disk full")
    del slot
    gc.collect()
    for orphan in owner.orphans:
        orphan.bury()
    assert place.freed == 1


def test_a_failed_copy_of_a_living_value_is_heard(owner: FakeOwner) -> None:
    slot, pattern = new_slot(owner)
    send(slot, owner)
    owner.copies[0].error = SpillError(28, "disk full")
    with pytest.raises(SpillError):
        slot.release()
    assert slot.where is Where.HELD
    owner.copies[0].error = None
    assert torch.equal(taken(slot), pattern), "the bytes are still here"


def test_a_refused_copy_out_leaves_everything_as_it_was(owner: FakeOwner) -> None:
    slot, pattern = new_slot(owner)
    owner.refuse = SpillError(28, "disk full")
    place = FakePlace(owner.log)
    with pytest.raises(SpillError):
        slot.send(place)  # type: ignore[arg-type]
    assert place.freed == 1
    assert slot.place is None
    assert torch.equal(taken(slot), pattern)


def test_a_refused_way_back_can_be_tried_again(owner: FakeOwner) -> None:
    slot, pattern = new_slot(owner)
    send(slot, owner)
    slot.release()
    owner.refuse = MemoryError()
    with pytest.raises(MemoryError):
        slot.take()
    assert slot.where is Where.AWAY
    owner.refuse = None
    assert torch.equal(taken(slot), pattern)


# -- savers ----------------------------------------------------------------------------------


def saved_thrice(owner: FakeOwner) -> tuple[Slot, list[Saved], list[Tensor]]:
    """Three views of one storage that only the slot holds, and what they must be."""
    tensor = torch.arange(SIZE // 4, dtype=torch.float32)
    slot = Slot(owner, tensor, 0)
    views = [tensor, tensor.view(32, 32)[3:, ::2].t(), tensor.view(torch.int32)]
    savers = [Saved(slot, view, memoryless_alias(view, view.new_empty(0))) for view in views]
    return slot, savers, [view.clone() for view in views]


def same(savers: list[Saved], expected: list[Tensor]) -> bool:
    found = [saved.rebuild() for saved in savers]
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(one, other) and one.dtype is other.dtype for one, other in pairs)


@pytest.mark.parametrize("way", ["stays", "is looked at", "leaves", "moves"])
def test_savers_get_what_they_saved(way: str, owner: FakeOwner) -> None:
    slot, savers, expected = saved_thrice(owner)
    assert slot.alone(), "a saver holds the memory"
    lives = watch(slot) if way == "is looked at" else None
    if way == "leaves":
        send(slot, owner)
        slot.release()
    elif way == "moves":
        slot.move_to(torch.empty(SIZE, dtype=torch.uint8))
    found = savers[0].rebuild()
    assert same(savers, expected)
    assert lives is None or lives() is not None
    assert found.data_ptr() == slot.storage().data_ptr() == savers[2].rebuild().data_ptr()
    assert not slot.alone(), "somebody has the tensor"
    del found
    assert slot.alone()


def test_what_a_saver_gives_back_shares_the_version(owner: FakeOwner) -> None:
    for which in (0, 1):
        saved = saved_thrice(owner)[1][which]
        with torch.inference_mode():
            found = saved.rebuild()
        saved.check()
        found.add_(1)
        with pytest.raises(RuntimeError, match="expected version 0 instead"):
            saved.check()


def test_an_interrupt_while_the_bytes_leave(owner: FakeOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    slot, pattern = new_slot(owner)
    send(slot, owner)

    def interrupted(slot: Slot, found: Tensor | None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "bytes", Slot.bytes.setter(interrupted))
        with pytest.raises(KeyboardInterrupt):
            slot.release()
    assert torch.equal(taken(slot), pattern)
