"""``verify=`` and ``check``: silent where the bits are right, and not where somebody has changed them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sessions import SMALL, Session, new_session, open_lms, outcome, plain_step, run_plain
from small_networks import NETWORKS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchlms
from torchlms.eager import slot as slot_module
from torchlms.eager.slot import Slot
from torchlms.eager.verifier import CANARY, Sums
from torchlms.memory.limits import format_bytes
from torchlms.memory.store import Store

MLP = NETWORKS["mlp"]
BUDGET = 900_000  # of 1.7 MB
STEPS = 8


# -- the sum -------------------------------------------------------------------------------------


def checksum(whole: Tensor) -> int:
    return Sums(torch.device("cpu")).checksum(whole)


def slow_checksum(data: bytes) -> int:
    odd = 0x9E3779B97F4A7C15
    whole = len(data) // 8
    total = sum(
        (2 * place + 1) * odd * int.from_bytes(data[8 * place : 8 * place + 8], "little")
        for place in range(whole)
    )
    return (total + (2 * whole + 1) * odd * int.from_bytes(data[8 * whole :], "little")) % (1 << 64)


@given(st.binary(max_size=100))
def test_the_sum_is_what_it_says(data: bytes) -> None:
    assert checksum(torch.tensor(list(data), dtype=torch.uint8)) == slow_checksum(data)


@pytest.mark.parametrize("size_bytes", [8, 13, 512, (1 << 19) + 5])
def test_the_sum_sees_one_bit_and_an_exchange(size_bytes: int) -> None:
    data = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8)
    before = checksum(data)
    for place in (0, size_bytes // 2, size_bytes - 1):
        data[place] ^= 1
        assert checksum(data) != before
        data[place] ^= 1
    if size_bytes >= 16:
        exchanged = torch.cat([data[8:16], data[:8], data[16:]])
        assert checksum(exchanged) != before
    assert checksum(data) == before


class Making(TorchDispatchMode):
    """Ops that return memory that was not there before."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.made = known, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage()._cdata not in self.known:
            self.made.append(str(func))
        return result


@pytest.mark.parametrize("words", [5, 1 << 16, (1 << 17) + 3])
def test_a_sum_takes_no_memory_of_its_own(words: int) -> None:
    data = torch.randint(0, 256, (8 * words + 3,), dtype=torch.uint8)
    sums = Sums(data.device)
    held = [data, *(item for item in vars(sums).values() if isinstance(item, Tensor))]
    with Making({tensor.untyped_storage()._cdata for tensor in held}) as making:
        found = sums.checksum(data)
    assert making.made == []
    assert found == slow_checksum(data.numpy().tobytes())
    assert sums.checksum(data) == found


# -- verify= -------------------------------------------------------------------------------------


def train(spill_dir: Path, **options: Any) -> tuple[Session, dict[str, Any]]:
    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir, rules=SMALL, **options) as lms:
        for step in range(STEPS):
            plain_step(session, step)
        return session, lms.stats()


@pytest.mark.parametrize("rules", [SMALL, {**SMALL, "recompute": True}])
def test_silent_where_the_bits_are_right(rules: dict[str, Any], spill_dir: Path) -> None:
    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir, rules=rules, verify=True) as lms:
        for step in range(STEPS):
            plain_step(session, step)
        found = lms.stats()
        assert found["verified_values"] > 0
        size = format_bytes(found["verified_bytes"])
        assert f"verify: {found['verified_values']} values came back whole, {size}\n" in lms.report()
    assert outcome(session).differences(run_plain(MLP, steps=STEPS)) == []


def test_off_unless_asked_for(spill_dir: Path) -> None:
    found = train(spill_dir)[1]
    assert (found["verifying"], found["verified_values"]) == (False, 0)


def test_the_report_says_so_where_nothing_left(spill_dir: Path) -> None:
    with torchlms.LMS(device="cpu", budget="1GiB", disk_dir=spill_dir, verify=True) as lms:
        assert "verify: no value has left and come back yet" in lms.report()
    with torchlms.LMS(device="cpu", budget="1GiB", disk_dir=spill_dir) as lms:
        assert "verify" not in lms.report()


def test_only_every_so_many_steps(spill_dir: Path) -> None:
    counts = []
    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir, rules=SMALL, verify=5) as lms:
        for step in range(16):
            plain_step(session, step)
            counts.append(lms.stats()["verified_values"])
    grew = [step + 1 for step in range(1, 16) if counts[step] > counts[step - 1]]
    assert [step for step in grew if step > 6] == [10, 15]


Sabotage = Callable[[pytest.MonkeyPatch], None]


def flip_on_the_way_back(patch: pytest.MonkeyPatch) -> None:
    right = Store.copy_in

    def wrong(self: Store, place: Any, target: Tensor, after: Any) -> Any:
        copy = right(self, place, target, after)
        copy.wait()
        target[0] ^= 1
        return copy

    patch.setattr(Store, "copy_in", wrong)


def write_after_the_copy_has_begun(patch: pytest.MonkeyPatch) -> None:
    right = Slot.send

    def wrong(self: Slot, place: Any) -> None:
        right(self, place)
        assert self.copy_out is not None
        assert self.bytes is not None
        self.copy_out.wait()
        self.bytes[-1] ^= 1

    patch.setattr(Slot, "send", wrong)


@pytest.mark.parametrize("sabotage", [flip_on_the_way_back, write_after_the_copy_has_begun])
def test_other_bytes_are_found_and_named(
    sabotage: Sabotage, spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir, rules=SMALL, verify=5) as lms:
        for step in range(9):
            plain_step(session, step)
        sabotage(monkeypatch)
        with pytest.raises(
            torchlms.VerifyFailed, match=r"made by aten\.\S+ in \S+, .*left for the disk before"
        ):
            plain_step(session, 9)  # the tenth step
        monkeypatch.undo()
        assert lms.state == "guard"
        session.optimizer.zero_grad()
        plain_step(session, 10)  # and the loop can go on


def test_without_verify_nobody_notices(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_on_the_way_back(monkeypatch)
    train(spill_dir)


@pytest.mark.parametrize("verify", [0, -1, 1.5, "yes"])
def test_bad_options(verify: Any) -> None:
    with pytest.raises(torchlms.BadOption, match="verify="):
        torchlms.LMS(device="cpu", verify=verify)


def test_who_reads_what_was_let_go_reads_the_canary(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A use count that lies: values leave although the program holds them."""
    monkeypatch.setattr(slot_module, "others_hold", lambda storage, ours: False)
    with torchlms.LMS(device="cpu", budget="1GiB", disk_dir=spill_dir, verify=True) as lms:
        held = torch.randn(64, 64, requires_grad=True).exp()
        out = held.exp()
        assert lms._engine is not None
        lms._engine.ladder.reclaim(1 << 60)
        assert bool((held.detach().view(torch.uint8) == CANARY).all())
        del out


# -- check ---------------------------------------------------------------------------------------


class Small(nn.Module):
    """With everything that ``check`` has to put back: buffers, gradients, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 64), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def state(model: nn.Module) -> list[Tensor]:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [
        item.detach().clone() for item in (*model.state_dict().values(), *gradients, torch.get_rng_state())
    ]


def test_check_finds_nothing_and_changes_nothing(spill_dir: Path) -> None:
    model, x = Small(), torch.randn(32, 16)
    model(x).backward()

    def step() -> Tensor:
        loss = model(x)
        loss.backward()
        return loss

    with torchlms.LMS(model, budget="1GiB", disk_dir=spill_dir) as lms:
        before = state(model)
        assert lms.check(step) >= 4
        assert all(torch.equal(left, right) for left, right in zip(state(model), before, strict=True))
        step()
        assert lms.check(step) >= 4


def test_check_finds_a_changed_bit(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Small(), torch.randn(32, 16)

    def step() -> Tensor:
        loss = model(x)
        loss.backward()
        return loss

    flip_on_the_way_back(monkeypatch)
    with (
        torchlms.LMS(model, budget="1GiB", disk_dir=spill_dir) as lms,
        pytest.raises(torchlms.VerifyFailed, match="the gradient of"),
    ):
        lms.check(step)


def test_check_says_when_it_can_say_nothing(spill_dir: Path) -> None:
    model = Small()
    draws = torch.Generator().manual_seed(1)

    def unstable() -> Tensor:
        loss = model(torch.randn(32, 16, generator=draws))
        loss.backward()
        return loss

    def tiny() -> Tensor:
        loss = model.layers[4].weight[:1, :1].sum()
        loss.backward()
        return loss

    with torchlms.LMS(model, budget="1GiB", disk_dir=spill_dir) as lms:
        with pytest.raises(torchlms.NotSupported, match="two runs of the step already differ"):
            lms.check(unstable)
        with pytest.raises(torchlms.NotSupported, match="nothing left the device"):
            lms.check(tiny)
    with pytest.raises(torchlms.NotSupported, match="inside the with block"):
        lms.check(tiny)
    with (
        torchlms.LMS(device="cpu", budget="1GiB", disk_dir=spill_dir) as bare,
        pytest.raises(torchlms.NotSupported, match="give LMS the model"),
    ):
        bare.check(tiny)


def test_an_exception_in_the_checked_step_leaves_lms_on(spill_dir: Path) -> None:
    model, x = Small(), torch.randn(32, 16)

    def broken() -> Tensor:
        model(x)
        raise ValueError("mine")

    with torchlms.LMS(model, budget="1GiB", disk_dir=spill_dir) as lms:
        with pytest.raises(ValueError, match="mine"):
            lms.check(broken)
        assert lms._installation is not None
        assert lms._installation.on
