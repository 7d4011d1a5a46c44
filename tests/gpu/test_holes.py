"""Holes on a real allocator: opened without remapping, bytes intact, and steps that end up calm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

import torchlms
from tests.gpu.networks import CASES, GIB, MIB, clean, make, plain, same, state, train
from torchlms.api import _use_remappable_segments
from torchlms.eager import private
from torchlms.eager.holes import Holes
from torchlms.eager.owner import SlotOwner
from torchlms.eager.slot import Slot
from torchlms.memory.device import CudaDevice

pytestmark = pytest.mark.gpu


class Owner(SlotOwner):
    def moved(self, slot: Slot) -> None:
        pass

    def forget(self, slot: Slot) -> None:
        pass


class Slots(list[Slot]):
    def living(self) -> Iterator[Slot]:
        return iter(self)


def test_a_hole_is_opened_while_the_device_is_busy() -> None:
    clean()
    device = CudaDevice(torch.device("cuda"))
    with ExitStack() as undo:
        _use_remappable_segments(undo, device, 2 * GIB, drops=True)
        device.cap(torch.cuda.memory_reserved() + 2 * GIB)
        undo.callback(device.uncap)
        owner = Owner()
        tensors = [torch.full((64 * MIB,), index, dtype=torch.uint8, device="cuda") for index in range(30)]
        slots = Slots(Slot(owner, tensor, index) for index, tensor in enumerate(tensors) if index % 2)
        del tensors
        before = private.allocator_remaps(device.torch_device)
        torch.cuda._sleep(200_000_000)  # what is moved is moved behind this
        Holes(device, slots).open([512 * MIB])
        large = torch.zeros(512 * MIB, dtype=torch.uint8, device="cuda")
        assert private.allocator_remaps(device.torch_device) == before
        for slot in slots:
            assert slot.bytes is not None
            assert bool((slot.bytes == slot.ordinal).all())
        del large, slots
    clean()


def test_steps_in_which_holes_are_opened_have_the_same_bits() -> None:
    case = CASES["convnet"]
    losses, expected = plain(case, 20)
    model, optimizer = make(case)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes) as lms:
        ours = train(model, optimizer, case, 20)
        stats = lms.stats()
    assert stats["starved_convolutions"] == 0
    assert ours == losses
    assert same(state(model), expected)
    assert stats["bytes_out_per_step"] > 0


@pytest.mark.xfail(
    raises=AssertionError,
    reason="not reached: some five remaps a step stay, at blocks of a tenth of the budget",
)
def test_planned_steps_end_up_without_remapping() -> None:
    case = CASES["convnet"]
    model, optimizer = make(case)
    with torchlms.LMS(model, optimizer, budget=case.budget_bytes):
        train(model, optimizer, case, 16)
        before = private.allocator_remaps(torch.device("cuda", 0))
        train(model, optimizer, case, 4)
        assert private.allocator_remaps(torch.device("cuda", 0)) - before <= 4
