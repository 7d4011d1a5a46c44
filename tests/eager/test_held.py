"""Rule held: what the program itself holds leaves too, and is whole again whenever an op touches it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sessions import (
    SMALL,
    STEPS,
    Session,
    assert_same_bits,
    new_session,
    open_lms,
    outcome,
    plain_peak,
    plain_step,
    run_lms,
    run_plain,
    slow_disk,
)
from small_networks import NETWORKS, Network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchlms import BudgetTooSmall, PlanMismatch, SpillError
from torchlms.core.held import with_held
from torchlms.core.plan import Choice
from torchlms.core.tape import Phase
from torchlms.core.validate import validate
from torchlms.eager import private
from torchlms.eager.engine import Engine
from torchlms.eager.lent import Lent
from torchlms.eager.orphans import Bereft
from torchlms.eager.slot import Slot, Where, find
from torchlms.memory.disk import SpillFile
from torchlms.memory.store import Store

HELD = {**SMALL, "held": True}
BOTH = {**HELD, "recompute": True}
WIDE, NARROW = 32, 4


class LongSkips(nn.Module):
    """Wide tensors wait in Python variables while narrow layers run, and are read at the end; without
    gradients of their own, which would wait on the way back."""

    def __init__(self, skips: int = 8) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Conv2d(3 if not at else WIDE, WIDE, 1) for at in range(skips))
        self.squeeze = nn.Conv2d(WIDE, NARROW, 1)
        self.middle = nn.Sequential(*(nn.Conv2d(NARROW, NARROW, 3, padding=1) for _ in range(6)))
        self.leave = nn.ModuleList(nn.Conv2d(NARROW + WIDE, NARROW, 1) for _ in range(skips))
        self.head = nn.Linear(NARROW, 10)
        self.look: Callable[[list[Tensor]], None] = lambda waiting: None

    def forward(self, x: Tensor) -> Tensor:
        waiting = []
        for layer in self.enter:
            x = torch.tanh(layer(x))
            waiting.append(x)
        x = self.middle(self.squeeze(x))
        self.look(waiting)
        for layer in self.leave:
            x = layer(torch.cat([x, waiting.pop().detach()], 1))
        return self.head(x.mean((2, 3)))


def _images(generator: torch.Generator, size: int) -> Tensor:
    return torch.randn(size, 3, 16, 16, generator=generator)


def _momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


SKIPS = Network("long skips", LongSkips, _momentum, _images, 8)
TIGHT = 0.35  # of what it needs: with less than 0.5 the skips that are held must leave


def looking(look: Callable[[list[Tensor]], None]) -> Callable[[Session, int], None]:
    """Steps in which ``look`` sees the waiting tensors in the middle of the forward pass."""

    def step(session: Session, number: int) -> None:
        session.model.look = look  # type: ignore[assignment]
        plain_step(session, number)

    return step


@contextmanager
def noting(session: Session, note: Callable[[Tensor], object]) -> Iterator[None]:
    """``note`` gets each wide tensor before the layer after it reads it."""
    layers = (*session.model.enter[1:], session.model.squeeze)  # type: ignore[union-attr]
    hooks = [layer.register_forward_pre_hook(lambda module, args: note(args[0])) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_without_the_rule_they_stay(spill_dir: Path) -> None:
    with pytest.raises(BudgetTooSmall):
        run_lms(SKIPS, int(TIGHT * plain_peak(SKIPS)), spill_dir, rules=SMALL)


@pytest.mark.parametrize("rules", [HELD, BOTH], ids=["moved", "dropped"])
def test_skip_connections_leave(spill_dir: Path, rules: dict[str, Any]) -> None:
    watched = assert_same_bits(SKIPS, plain_step, spill_dir, share=TIGHT, rules=rules)
    tape, plan = watched.tape, watched.plan
    assert validate(tape, plan) == []
    early = [move for move in plan.moves if tape.values[move.value].idle[move.stretch].touched]
    assert early, "in the forward pass"
    for move in early:
        assert tape.ops[move.reload_op].phase is Phase.FORWARD


def test_the_planned_steps_bring_them_back_in_time(spill_dir: Path) -> None:
    session = new_session(SKIPS)
    with open_lms(session, int(TIGHT * plain_peak(SKIPS)), spill_dir, rules=HELD) as lms:
        for step in range(4):
            plain_step(session, step)
        engine = lms._engine
        assert engine is not None
        engine.lent.late = 0
        reclaims = engine.ladder.reclaims
        emptied = []
        session.model.look = lambda waiting: emptied.append(  # type: ignore[assignment]
            sum(tensor.untyped_storage().nbytes() == 0 for tensor in waiting)
        )
        plain_step(session, 4)
        assert emptied[0] > 0
        assert engine.lent.late == 0
        assert engine.ladder.reclaims == reclaims
        assert not engine.lent


def test_a_block_s_input_leaves_while_the_block_runs(spill_dir: Path) -> None:
    """The caller of a module holds its input until it returns."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Conv2d(3, WIDE, 1)
            self.insides = nn.ModuleList(
                nn.Sequential(nn.Conv2d(WIDE, NARROW, 1), nn.Conv2d(NARROW, WIDE, 3, padding=1), nn.Tanh())
                for _ in range(4)
            )
            self.head = nn.Linear(WIDE, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.enter(x))
            for inside in self.insides:
                x = inside(x)
            return self.head(x.mean((2, 3)))

    block = Network("block", Block, _momentum, _images, 8)
    watched = assert_same_bits(block, plain_step, spill_dir, share=0.8, rules=HELD)
    held = [value for value in watched.tape.values if any(s.held_until is not None for s in value.idle)]
    assert held
    wide = max(held, key=lambda value: value.size_bytes)
    assert any(stretch.start < stretch.free_from < stretch.stop for stretch in wide.idle)


# -- what programs may do to what is away ----------------------------------------------------


def read(waiting: list[Tensor]) -> None:
    assert all(torch.isfinite(tensor).all() for tensor in waiting)


def read_views(waiting: list[Tensor]) -> None:
    for tensor in waiting:
        assert float(tensor.detach()[1:, ::2].transpose(0, 1).flatten()[-1]) == float(tensor[-1, -2, -1, -1])


def copy_out(waiting: list[Tensor]) -> None:
    for tensor in waiting:
        assert tensor.detach().clone().numpy().shape == tensor.shape


def write_data(waiting: list[Tensor]) -> None:
    """Behind autograd's back: what it saved is the same storage, and sees it."""
    for tensor in waiting:
        tensor.data.mul_(0.5)


def write_through_a_view(waiting: list[Tensor]) -> None:
    waiting[0].detach()[0].zero_()


def write_often(waiting: list[Tensor]) -> None:
    for _ in range(3):
        waiting[-1].data.add_(0.25)
        torch.ones(8).sum()


@pytest.mark.parametrize("look", [read, read_views, copy_out, write_data, write_often])
def test_whoever_looks_sees_the_bytes(spill_dir: Path, look: Callable[[list[Tensor]], None]) -> None:
    assert_same_bits(SKIPS, looking(look), spill_dir, share=0.45, rules=HELD)


def test_a_program_that_looks_when_the_plan_does_not_expect_it(spill_dir: Path) -> None:
    """Recorded without a look; later steps read and write what is away."""

    def step(session: Session, number: int) -> None:
        session.model.look = write_data if number >= 4 else lambda waiting: None  # type: ignore[assignment]
        plain_step(session, number)

    assert_same_bits(SKIPS, step, spill_dir, share=0.45, steps=8, rules=HELD)


def test_writes_between_the_copy_and_the_release(spill_dir: Path) -> None:
    """What was copied before a write is not what comes back."""
    session = new_session(SKIPS)
    plain = run_plain(SKIPS, looking(write_data))
    written = 0
    with open_lms(session, int(0.9 * plain_peak(SKIPS)), spill_dir, rules=HELD) as lms:
        engine = lms._engine
        assert engine is not None

        def write_while_it_is_copied(waiting: list[Tensor]) -> None:
            nonlocal written
            for tensor in waiting:
                slot = find(tensor.untyped_storage(), engine)
                if slot is not None and slot.lendable() and slot.place is None:
                    slot.lend()
                    slot.send(engine.store.place(slot.size_bytes))
                    written += 1
                tensor.data.mul_(0.5)
                if slot is not None and slot.place is not None:
                    slot.release()

        for step in range(6):
            looking(write_while_it_is_copied)(session, step)
    assert written
    assert outcome(session).differences(plain) == []


def test_in_place_changes_raise_as_they_do_plainly(spill_dir: Path) -> None:
    session = new_session(SKIPS)
    with open_lms(session, int(TIGHT * plain_peak(SKIPS)), spill_dir, rules=HELD):
        for step in range(4):
            plain_step(session, step)
        session.model.look = lambda waiting: [tensor.detach().mul_(2) for tensor in waiting]  # type: ignore
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            plain_step(session, 4)


def test_kept_until_after_the_step(spill_dir: Path) -> None:
    """A list of activations that outlives forward, backward and graph, as for a plot."""
    seen: list[str] = []

    def step(session: Session, number: int) -> None:
        kept: list[Tensor] = []
        session.model.look = kept.extend  # type: ignore[assignment]
        plain_step(session, number)
        seen.extend(float(tensor.detach().double().sum()).hex() for tensor in kept)

    plain = run_plain(SKIPS, step)
    expected = list(seen)
    seen.clear()
    budget_bytes = int(0.75 * plain_peak(SKIPS, step))
    seen.clear()
    watched = run_lms(SKIPS, budget_bytes, spill_dir, step, rules=HELD)
    assert watched.outcome.differences(plain) == []
    assert seen == expected


@pytest.mark.parametrize("leave", ["graph", "error", "exit"])
def test_what_is_away_when_the_graph_goes_comes_back(spill_dir: Path, leave: str) -> None:
    """The graph is let go of, the loop raises, or LMS is left, in the middle of a forward pass."""
    session = new_session(SKIPS)
    kept: list[Tensor] = []

    class Enough(Exception):
        pass

    def hold(waiting: list[Tensor]) -> None:
        kept.extend(tensor.detach() for tensor in waiting[:4])  # all of them are more than the budget
        raise Enough

    inputs, _ = SKIPS.batch(4)
    with open_lms(session, int(TIGHT * plain_peak(SKIPS)), spill_dir, rules=HELD) as lms:
        for step in range(4):
            plain_step(session, step)
        session.model.look = hold  # type: ignore[assignment]
        if leave == "exit":
            try:
                session.model(inputs)
            except Enough as error:
                held = error  # and with it the frames and the graph
        else:
            with pytest.raises(Enough):
                session.model(inputs)
            gc.collect()
        assert lms._engine is not None
        if leave == "graph":
            assert any(tensor.untyped_storage().nbytes() == 0 for tensor in kept)
            found = [tensor[-1, -1].clone() for tensor in kept]
    if leave != "graph":
        found = [tensor[-1, -1].clone() for tensor in kept]
    held = None  # noqa: F841
    kept.clear()
    session.model.look = lambda waiting: kept.extend(tensor.detach() for tensor in waiting)  # type: ignore
    session.model(inputs)
    assert all(torch.equal(mine, its[-1, -1]) for mine, its in zip(found, kept, strict=False))


def test_steps_after_an_interrupted_one(spill_dir: Path) -> None:
    def stop(waiting: list[Tensor]) -> None:
        raise KeyboardInterrupt

    def step(session: Session, number: int) -> None:
        if number in (2, 5):
            session.model.look = stop  # type: ignore[assignment]
            with pytest.raises(KeyboardInterrupt):
                plain_step(session, number)
            session.model.look = lambda waiting: None  # type: ignore[assignment]
        plain_step(session, number)

    assert_same_bits(SKIPS, step, spill_dir, share=TIGHT, steps=8, rules=HELD)


def test_a_storage_that_somebody_holds_stays(spill_dir: Path) -> None:
    """Bytes can be had from it without any op."""
    storages: list[Any] = []

    def hold(waiting: list[Tensor]) -> None:
        assert all(storage.nbytes() for storage in storages)

    def step(session: Session, number: int) -> None:
        session.model.look = hold  # type: ignore[assignment]
        with noting(session, lambda tensor: storages.append(tensor.untyped_storage())):
            plain_step(session, number)
        storages.clear()

    plain = run_plain(SKIPS, step)
    budget_bytes = int(0.95 * plain_peak(SKIPS))
    assert run_lms(SKIPS, budget_bytes, spill_dir, step, rules=HELD).outcome.differences(plain) == []


def test_what_numpy_shares_stays(spill_dir: Path) -> None:
    """The array keeps the memory, and would read what lies there next."""
    arrays: list[Any] = []

    def step(session: Session, number: int) -> None:
        session.model.look = (
            lambda waiting: [  # type: ignore[assignment]
                session.note(tensor.sum() - float(array.sum()))
                for tensor, array in zip(waiting[1:], arrays[1:], strict=True)
            ]
        )
        with noting(session, lambda tensor: arrays.append(tensor.detach().numpy())):
            plain_step(session, number)
        arrays.clear()

    plain = run_plain(SKIPS, step)
    budget_bytes = int(0.95 * plain_peak(SKIPS))
    assert run_lms(SKIPS, budget_bytes, spill_dir, step, rules=HELD).outcome.differences(plain) == []


def test_evaluation_and_checkpoints_between(spill_dir: Path) -> None:
    def step(session: Session, number: int) -> None:
        inputs, target = session.network.batch(number)
        session.optimizer.zero_grad()
        model: Any = session.model
        x = torch.tanh(model.enter[0](inputs))
        waiting = checkpoint(lambda held: torch.tanh(model.enter[1](held)), x, use_reentrant=False)
        with torch.no_grad():
            torch.tanh(model.enter[0](inputs))
        narrow = model.middle(model.squeeze(waiting))
        narrow = model.leave[0](torch.cat([narrow, waiting], 1))
        loss = F.cross_entropy(model.head(narrow.mean((2, 3))), target) + x.square().mean()
        loss.backward()
        session.optimizer.step()
        session.note(loss)

    assert_same_bits(SKIPS, step, spill_dir, share=0.9, rules=HELD)


def _sparse(tensor: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.arange(len(tensor))[None], tensor.detach(), tensor.shape, is_coalesced=True
    )


def _jagged(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(tensor.detach().flatten(1), torch.tensor([0, 3, 8]))


@pytest.mark.parametrize("wrap", [_sparse, _jagged])
def test_what_is_inside_of_other_tensors_comes_back(
    spill_dir: Path, wrap: Callable[[Tensor], Tensor]
) -> None:
    """An op on them reads a storage that is not among its arguments."""
    wrapped: list[Tensor] = []
    sums: list[float] = []

    def look(waiting: list[Tensor]) -> None:
        sums.extend(float((item * 2).values().sum()) for item in wrapped[-2:])

    def step(session: Session, number: int) -> None:
        wrapped.clear()
        first: Any = session.model.enter[1]  # type: ignore[index]
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: wrapped.append(wrap(args[0])))
            for layer in (first, session.model.enter[2])  # type: ignore[index]
        ]
        session.model.look = look  # type: ignore[assignment]
        plain_step(session, number)
        for hook in hooks:
            hook.remove()
        wrapped.clear()

    plain = run_plain(SKIPS, step)
    expected = list(sums)
    for options in ({}, {"plan": False}):
        sums.clear()
        watched = run_lms(SKIPS, int(0.5 * plain_peak(SKIPS)), spill_dir, step, rules=HELD, **options)
        assert watched.outcome.differences(plain) == []
        assert sums == expected


def lent(tensor: Tensor, engine: Engine) -> Slot:
    """The slot of a tensor that the program holds, lent, and on its way out."""
    slot = find(tensor.untyped_storage(), engine)
    assert slot is not None
    slot.lend()
    slot.send(engine.store.place(slot.size_bytes))
    return slot


def test_a_storage_that_somebody_holds_is_not_turned_back(spill_dir: Path) -> None:
    """What was emptied once is not emptied again when somebody got hold of it on its way back."""
    session = new_session(SKIPS)
    seen = 0
    with open_lms(session, int(0.9 * plain_peak(SKIPS)), spill_dir, rules=HELD) as lms:
        engine = lms._engine
        assert engine is not None

        def look(waiting: list[Tensor]) -> None:
            nonlocal seen
            alias = waiting[0].detach()
            slot = lent(alias, engine)
            slot.release()
            assert slot.where is Where.AWAY
            slot.fetch()
            storage = alias.untyped_storage()
            assert not slot.turn_back()
            assert storage.nbytes() == slot.size_bytes
            seen += 1

        for step in range(4):
            looking(look)(session, step)
    assert seen == 4
    assert outcome(session).differences(run_plain(SKIPS, steps=4)) == []


def test_a_storage_that_the_program_has_resized_is_its_own(spill_dir: Path) -> None:
    """Some programs empty what they can make again, and fill it before backward."""

    def look(waiting: list[Tensor]) -> None:
        storage = waiting[2].untyped_storage()
        copy, size_bytes = storage.clone(), storage.nbytes()
        storage.resize_(0)
        del storage
        torch.ones(1 << 12).sum()
        storage = waiting[2].untyped_storage()
        storage.resize_(size_bytes)
        storage.copy_(copy)

    def step(session: Session, number: int) -> None:
        session.model.look = look  # type: ignore[assignment]
        plain_step(session, number)

    plain = run_plain(SKIPS, plain_step)
    for options in ({}, {"plan": False}):
        watched = run_lms(SKIPS, int(0.95 * plain_peak(SKIPS)), spill_dir, step, rules=HELD, **options)
        assert watched.outcome.differences(plain) == []


def test_interrupted_while_it_is_emptied(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session(SKIPS)
    with open_lms(session, int(0.9 * plain_peak(SKIPS)), spill_dir, rules=HELD) as lms:
        engine = lms._engine
        assert engine is not None

        def stop(tensor: Tensor) -> None:
            raise KeyboardInterrupt

        def look(waiting: list[Tensor]) -> None:
            before = waiting[0].clone()
            slot = lent(waiting[0], engine)
            with monkeypatch.context() as interrupted:
                interrupted.setattr(engine, "resized", stop)
                with pytest.raises(KeyboardInterrupt):
                    slot.release()
            assert torch.equal(waiting[0], before)

        for step in range(4):
            looking(look)(session, step)
    assert outcome(session).differences(run_plain(SKIPS, steps=4)) == []


def test_interrupted_as_it_begins_to_come_back(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's storage is emptied again only when nobody writes to it any more, and then it is."""
    session = new_session(SKIPS)
    with open_lms(session, int(0.9 * plain_peak(SKIPS)), spill_dir, rules=HELD) as lms:
        engine = lms._engine
        assert engine is not None
        store, read, ended = engine.store, engine.store._read_cpu, []

        def slowly(*args: Any) -> None:
            time.sleep(0.05)
            read(*args)
            ended.append(True)

        def begin_and_stop(*args: Any) -> None:
            Store.copy_in(store, *args)
            raise KeyboardInterrupt

        def look(waiting: list[Tensor]) -> None:
            before = waiting[0].clone()
            slot = lent(waiting[0], engine)
            slot.release()
            del ended[:]
            with monkeypatch.context() as interrupted:
                interrupted.setattr(store, "_read_cpu", slowly)
                interrupted.setattr(store, "copy_in", begin_and_stop)
                with pytest.raises(KeyboardInterrupt):
                    slot.fetch()
            assert ended
            assert slot.where is Where.AWAY
            with private.unwatched():
                assert waiting[0].untyped_storage().nbytes() == 0
            assert torch.equal(waiting[0], before)

        for step in range(4):
            looking(look)(session, step)
    assert outcome(session).differences(run_plain(SKIPS, steps=4)) == []


def test_what_is_older_than_the_step_stays(spill_dir: Path) -> None:
    """All data on the device, of which a batch is a view: the program may save or show it at any moment."""
    data = torch.cat([SKIPS.batch(number)[0] for number in range(STEPS)])

    def look(waiting: list[Tensor]) -> None:
        assert data.untyped_storage().nbytes() == data.numel() * data.itemsize

    def step(session: Session, number: int) -> None:
        session.model.look = look  # type: ignore[assignment]
        size, target = SKIPS.batch_size, SKIPS.batch(number)[1]
        session.optimizer.zero_grad()
        loss = F.cross_entropy(session.model(data[number * size : (number + 1) * size]), target)
        loss.backward()
        session.optimizer.step()
        session.note(loss)

    assert_same_bits(SKIPS, step, spill_dir, share=0.45, rules=HELD)
    assert_same_bits(SKIPS, step, spill_dir, share=0.45, rules=HELD, plan=False)


# -- trouble ---------------------------------------------------------------------------------


def test_a_copy_that_fails_leaves_the_value_where_it_is(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session(SKIPS)
    with open_lms(session, int(0.4 * plain_peak(SKIPS)), spill_dir, rules=HELD):
        for step in range(4):
            plain_step(session, step)
        with monkeypatch.context() as broken:

            def fails(self: SpillFile, *args: Any) -> None:
                raise SpillError(28, "no space left on device")

            broken.setattr(SpillFile, "write", fails)
            before = {name: item.clone() for name, item in session.model.state_dict().items()}
            try:
                plain_step(session, 4)
            except (BudgetTooSmall, SpillError, RuntimeError):
                for name, item in session.model.state_dict().items():
                    assert torch.equal(item, before[name])
            else:
                pytest.fail("there was room for all of it")
        gc.collect()
        session.losses[4:] = []
        for step in range(4, 6):
            plain_step(session, step)
    assert outcome(session).differences(run_plain(SKIPS, steps=6)) == []


class Ward:
    """An owner and a place; copies of theirs bring ones."""

    def __init__(self) -> None:
        self.freed = 0

    def allocate(self, size_bytes: int, *, early: bool = False) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def resized(self, tensor: Tensor) -> None:
        pass

    def start_in(self, place: Any, target: Tensor, after: Any) -> Any:
        target.fill_(1)
        return Brought()

    def free(self) -> None:
        self.freed += 1


class Brought:
    def wait(self) -> None:
        pass


class Lost:
    def wait(self) -> None:
        raise SpillError(5, "read error")


@pytest.mark.parametrize("back", [None, Lost(), Brought()])
def test_a_copy_back_that_fails_once_its_slot_is_dead_is_made_again(back: Any) -> None:
    ward: Any = Ward()
    tensor = torch.zeros(4096, dtype=torch.uint8)
    bereft = Bereft(ward, tensor.detach(), 4096, ward, None, back)
    if back is None:
        tensor.untyped_storage().resize_(0)
    assert not bereft.let_go()
    bereft.fill()
    assert ward.freed == 1
    assert int(tensor.sum()) == (0 if isinstance(back, Brought) else 4096)


def test_one_that_cannot_come_back_keeps_no_other_away() -> None:
    ward: Any = Ward()
    lent = Lent(ward)
    first, second = (torch.zeros(4096, dtype=torch.uint8) for _ in range(2))
    for tensor in (first, second):
        lent.keep(Bereft(ward, tensor.detach(), 4096, ward, None, None))
        tensor.untyped_storage().resize_(0)
    right, calls = ward.start_in, []

    def fails_first(*args: Any) -> Any:
        calls.append(args)
        return Lost() if len(calls) == 1 else right(*args)

    ward.start_in = fails_first
    with pytest.raises(SpillError):
        lent.recall()
    assert second.sum() == 4096
    lent.recall()
    assert first.sum() == 4096
    assert not lent


def test_verified(spill_dir: Path) -> None:
    """With sums and canaries: what is let go of is overwritten first, and nobody reads it."""
    assert_same_bits(SKIPS, plain_step, spill_dir, share=TIGHT, rules=HELD, verify=True)


def test_values_that_are_held_and_then_dropped(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_disk(monkeypatch)
    watched = assert_same_bits(SKIPS, plain_step, spill_dir, share=0.4, steps=12, rules=BOTH)
    assert validate(watched.tape, watched.plan) == []
    assert any(move.choice is Choice.RECOMPUTE for move in watched.plan.moves)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.6, pytest.param(0.8, marks=pytest.mark.more)])
def test_every_network(spill_dir: Path, name: str, share: float) -> None:
    assert_same_bits(NETWORKS[name], plain_step, spill_dir, share=share, rules=BOTH)


def test_a_tape_says_what_the_rule_would_bring(spill_dir: Path) -> None:
    """Recorded without the rule; the refusal names it."""
    from torchlms.core.curve import smallest_budget
    from torchlms.core.machine import Machine
    from torchlms.core.plan import Budget
    from torchlms.core.planner import plan
    from torchlms.core.rules import Rules

    watched = run_lms(SKIPS, int(0.95 * plain_peak(SKIPS)), spill_dir, rules=SMALL)
    tape = watched.tape
    needs, freed = smallest_budget(tape), smallest_budget(with_held(tape))
    assert freed < 0.8 * needs
    assert with_held(with_held(tape)) == with_held(tape)
    machine = Machine(
        "cpu", 1 << 30, torch.__version__, disk_write_bytes_per_s=1e9, disk_read_bytes_per_s=1e9
    )
    budget = Budget((needs + freed) // 2, 0, 1 << 30)
    with pytest.raises(BudgetTooSmall, match="With rule held it is"):
        plan(tape, machine, budget, Rules(min_bytes=0))
    assert plan(with_held(tape), machine, budget, Rules(min_bytes=0)).moves


def test_a_plan_is_for_the_rule_that_it_was_made_with(spill_dir: Path) -> None:
    budget_bytes = int(0.95 * plain_peak(SKIPS))
    plans = {
        held: run_lms(SKIPS, int(share * plain_peak(SKIPS)), spill_dir, rules={**SMALL, "held": held}).plan
        for held, share in ((False, 0.9), (True, TIGHT))
    }
    for held, plan in plans.items():
        given = run_lms(SKIPS, budget_bytes, spill_dir, rules={**SMALL, "held": held}, plan=plan)
        assert given.outcome.differences(run_plain(SKIPS)) == []
    with pytest.raises(PlanMismatch, match="another rule held"):
        run_lms(SKIPS, budget_bytes, spill_dir, rules=SMALL, plan=plans[True])


@pytest.mark.more
@pytest.mark.parametrize(
    "options",
    [{}, {"plan": False}],
    ids=["planned", "unplanned"],
)
def test_lengths_of_packed_sequences_stay(spill_dir: Path, options: dict[str, Any]) -> None:
    """Recurrent networks in torch's own code hold their address while ops pass by."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(8, 16)
            self.inside = nn.LSTM(16, 16, 2)
            self.head = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            entered = torch.tanh(self.enter(x))
            lengths = torch.tensor([80, 60, 48, 36, 24, 12])  # as many steps: more than ``min_bytes``
            packed, _ = self.inside(nn.utils.rnn.pack_padded_sequence(entered, lengths))
            left, _ = nn.utils.rnn.pad_packed_sequence(packed)
            return self.head((left + entered).mean(0))

    def sequences(generator: torch.Generator, size: int) -> Tensor:
        return torch.randn(80, size, 8, generator=generator)

    packed = Network("packed", Packed, _momentum, sequences, 6)
    rules = {**HELD, "min_bytes": 512}
    assert_same_bits(packed, plain_step, spill_dir, share=0.8, steps=4, rules=rules, **options)
