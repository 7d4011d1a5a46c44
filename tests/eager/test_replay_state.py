"""Ops that run again find the backends' switches as they were, and sources that nothing has written since."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sessions import DROPPING, more, slow_disk
from torch import Tensor, nn
from traps import STEPS, Loop, Trap, assert_same, batch, train, usual

import torchlms
from torchlms.eager.backends import Backends
from torchlms.eager.history import Call
from torchlms.eager.private import backend_switches
from torchlms.eager.timer import OpTimer
from torchlms.eager.traits import generator_of
from torchlms.eager.watcher import Watcher
from torchlms.eager.writes import without_statistics, written_tensors

Around = Callable[[], contextlib.AbstractContextManager[Any]]


@pytest.fixture(autouse=True)
def moving_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_disk(monkeypatch)


@contextlib.contextmanager
def no_mkldnn() -> Iterator[None]:
    torch.backends.mkldnn.enabled = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def convolving(model: nn.Module, x: Tensor) -> Tensor:
    """Of which mkldnn and the other kernel give other bits."""
    kernel = model.scale.new_ones(4, 4, 3, 3) * model.scale[:4].view(4, 1, 1, 1)  # type: ignore[operator,index]
    return torch.tanh(F.conv2d(x.view(512, 4, 4, 4), kernel / 7, padding=1)).reshape(512, 64)


def under(forward: Around, backward: Around, since: int) -> Any:
    """A loop with ``forward`` and ``backward`` around them, from step ``since`` on."""

    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        with forward() if step >= since else contextlib.nullcontext():
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        with backward() if step >= since else contextlib.nullcontext():
            loss.backward()
        optimizer.step()
        return float(loss.detach()).hex()

    return loop


@pytest.mark.parametrize(
    ("forward", "backward", "since"),
    [
        (no_mkldnn, contextlib.nullcontext, 0),
        (contextlib.nullcontext, no_mkldnn, STEPS - 2),
        (contextlib.nullcontext, two_threads, STEPS - 2),
        more(no_mkldnn, contextlib.nullcontext, STEPS - 2),
        more(contextlib.nullcontext, no_mkldnn, 0),
        more(contextlib.nullcontext, two_threads, 0),
    ],
)
def test_switches_stand_as_they_did(forward: Around, backward: Around, since: int, spill_dir: Path) -> None:
    stats = assert_same(convolving, spill_dir, under(forward, backward, since), budget_bytes=1_200_000)
    assert stats["replayed_ops"]
    assert torch.backends.mkldnn.enabled  # type: ignore[attr-defined]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_switch_is_found_and_can_be_turned_and_turned_back(device_type: str) -> None:
    """The names of torch's private readers and writers are still what we take them for."""
    slow, quick = backend_switches(device_type)
    assert all(read() is not None for read, _ in (*slow, *quick)), "torch lacks one of the switches"
    backends = Backends(device_type)
    before = backends.state()
    assert backends.state() is before
    for place, setting in enumerate(before):
        if type(setting) is not bool:
            continue
        wanted = (*before[:place], not setting, *before[place + 1 :])
        with backends.set_to(wanted):
            assert Backends(device_type).state() == wanted
        assert Backends(device_type).state() == before


def test_tf32_asked_for_in_the_old_way_is_seen_among_the_quick_ones() -> None:
    backends = Backends("cuda")
    torch.set_float32_matmul_precision("highest")
    before = backends.state()
    torch.set_float32_matmul_precision("high")
    try:
        meanwhile = backends.state()
        assert meanwhile[0] == "high"
        with backends.set_to(before):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert backends.state() == before


# -- writes that no schema tells of --------------------------------------------------------------


def normed(model: nn.Module, x: Tensor) -> Tensor:
    return F.relu(F.silu(model.norm(x)) * 2 + 0.5)  # type: ignore[operator]


class Normed(Trap):
    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__(middle)
        self.norm = nn.BatchNorm1d(64)


def statistics_move_before_backward(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
    """The graph reads running statistics, which a pass in training then updates."""
    x, y = batch(step)
    model.eval()
    loss = F.cross_entropy(model(x), y)
    model.train()
    with torch.no_grad():
        model(batch(step + 100)[0])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach()).hex()


def test_running_statistics_are_behind_the_write_barrier(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traps.Trap", Normed)
    stats = assert_same(normed, spill_dir, statistics_move_before_backward)
    assert stats["plan"]["recompute"]["values"] > 0  # type: ignore[index]
    assert_same(normed, spill_dir, usual)


def test_what_batch_norm_writes() -> None:
    x, mean, variance = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    for training in (True, False):
        args = (x, None, None, mean, variance, training, 0.1, 1e-5)
        func = torch.ops.aten.native_batch_norm.default
        before = (mean.clone(), variance.clone())
        func(*args)
        changed = not (torch.equal(mean, before[0]) and torch.equal(variance, before[1]))
        assert changed is training, "torch has changed: what is said of this op is no longer so"
        assert [id(item) for item in written_tensors(func, args, {})] == [id(mean), id(variance)] * training
        assert (without_statistics(func, args)[3] is None) is training


@pytest.mark.parametrize("old", [True, False])
def test_spectral_norm(old: bool, spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vectors are written in each forward pass, and read by what makes the weight."""
    norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm

    class Spectral(Trap):
        def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
            super().__init__(middle)
            self.inner = nn.ModuleList(norm(layer) for layer in self.inner)  # type: ignore[operator]

    monkeypatch.setattr("traps.Trap", Spectral)
    stats = assert_same(lambda model, x: F.relu(F.silu(x) * 2 + 0.5), spill_dir)
    assert stats["replayed_ops"]


# -- parameters that lie elsewhere by the time of backward ---------------------------------------


def scaled(model: nn.Module, x: Tensor) -> Tensor:
    return F.relu(F.silu(x * model.scale + model.shift) * 2 + 0.5)  # type: ignore[operator]


def given_other_data(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
    """As averaged weights are swapped in and out: the graph was made with the old data."""
    x, y = batch(step)
    loss = F.cross_entropy(model(x), y)
    before = model.scale.data
    model.scale.data = torch.full_like(before, 1.5)
    optimizer.zero_grad()
    loss.backward()
    model.scale.data = before
    optimizer.step()
    return float(loss.detach()).hex()


def test_a_parameter_that_is_given_other_data(spill_dir: Path) -> None:
    stats = assert_same(scaled, spill_dir, given_other_data)
    assert stats["replayed_ops"]


def test_a_leaf_that_is_kept_shows_its_new_data_as_in_plain_pytorch(spill_dir: Path) -> None:
    gradients = []
    for lms in (contextlib.nullcontext(), torchlms.LMS(device="cpu", budget="1GiB", disk_dir=spill_dir)):
        weight = torch.nn.Parameter(torch.full((64, 64), 2.0))
        x = torch.ones(64, 64, requires_grad=True)
        with lms:
            y = x @ weight
            weight.data = torch.full((64, 64), 3.0)
            y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert float(gradients[0][0, 0]) == 3 * 64


def test_so_does_one_that_is_no_parameter(spill_dir: Path) -> None:
    gradients = []
    for lms in (contextlib.nullcontext(), torchlms.LMS(device="cpu", budget="1GiB", disk_dir=spill_dir)):
        weight = torch.nn.Parameter(torch.ones(64))
        x = torch.full((64, 64), 2.0, requires_grad=True)
        with lms:
            y = (x * weight).sum()
            x.data = torch.full((64, 64), 3.0)
            y.backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)
    assert float(gradients[0][0]) == 3 * 64


def test_what_cannot_be_made_again_is_left_whole_from_then_on(spill_dir: Path) -> None:
    """A program that takes a parameter's bytes away before each backward pass: plans learn to do without."""
    failed: dict[int, str] = {}

    def emptied(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        storage, before = model.scale.untyped_storage(), model.scale.detach().clone()
        if step >= STEPS - 4:
            storage.resize_(0)
        try:
            loss.backward()
        except torchlms.ReplayFailed as error:
            failed[step] = str(error)
        storage.resize_(before.untyped_storage().nbytes())
        with torch.no_grad():
            model.scale.copy_(before)
        optimizer.zero_grad()
        return float(loss.detach()).hex()

    train(lambda model, x: F.relu(torch.sigmoid(x) + model.scale), spill_dir, emptied)
    assert 1 <= len(failed) <= 2
    for said in failed.values():
        assert "made by aten." in said, "it names the op"
        assert "recompute=False" in said


def test_a_parameter_without_its_bytes_is_an_error_and_not_a_guess(spill_dir: Path) -> None:
    def emptied(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        if step == STEPS - 1:
            model.scale.untyped_storage().resize_(0)
        optimizer.zero_grad()
        loss.backward()
        return float(loss.detach()).hex()

    with pytest.raises(torchlms.ReplayFailed, match="and 0 bytes"):
        train(lambda model, x: F.relu(F.silu(x + model.scale) * 2 + 0.5), spill_dir, emptied)


def test_an_op_that_fails_when_it_runs_again(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises: one error that names the value, the op and what to do; and the loop can go on."""
    right, armed, said = Watcher.run_again, [False], list[str]()

    def failing(self: Watcher, func: Any, args: Any, kwargs: Any) -> Any:
        if armed[0]:
            armed[0] = False
            raise RuntimeError("on purpose")
        return right(self, func, args, kwargs)

    def guarded(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        armed[0] = step == STEPS - 2
        try:
            return usual(model, optimizer, step)
        except torchlms.ReplayFailed as error:
            said.append(str(error))
            model.load_state_dict(before)
            return usual(model, optimizer, step)

    monkeypatch.setattr(Watcher, "run_again", failing)
    train(lambda model, x: F.relu(F.silu(x + model.scale) * 2 + 0.5), spill_dir, guarded)
    (text,) = said
    assert "RuntimeError when it ran again: on purpose" in text
    assert "made by aten." in text
    assert "recompute=False" in text


# -- random ops ----------------------------------------------------------------------------------


def dropping(model: nn.Module, x: Tensor) -> Tensor:
    del model
    return F.relu(F.dropout(F.gelu(x), 0.3))


def test_the_programs_generator_is_not_touched(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may draw from it while an op runs again."""
    set_states = []
    monkeypatch.setattr("torchlms.eager.replay._drawn_again", lambda *_: set_states.append(1))
    stats = assert_same(dropping, spill_dir, budget_bytes=1_200_000)
    assert stats["replayed_ops"]
    assert not set_states


def test_batched_gradients(spill_dir: Path) -> None:
    """They unpack inside a vmap, which refuses random ops."""

    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        if step < STEPS - 2:
            return usual(model, optimizer, step)
        scores = model(x)
        rows = torch.eye(4)[:2, None, :].expand(2, 512, 4)
        (slopes,) = torch.autograd.grad(scores, [model.scale], rows, is_grads_batched=True)
        return float(slopes.square().sum() + F.cross_entropy(scores, y).detach()).hex()

    stats = assert_same(lambda model, x: dropping(model, x * model.scale), spill_dir, loop, 1_500_000)
    assert stats["replayed_ops"]


def test_warnings_of_what_does_not_repeat_stay_warnings(spill_dir: Path) -> None:
    @contextlib.contextmanager
    def warning() -> Iterator[None]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        finally:
            torch.use_deterministic_algorithms(False)

    assert_same(scaled, spill_dir, under(contextlib.nullcontext, warning, 0))


def test_what_the_program_keeps_does_not_keep_its_history(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small result kept in a list at each step, as for a log."""
    # How many calls are known depends on what is dropped, and that on times: not on this machine's.
    times = OpTimer.times
    monkeypatch.setattr(OpTimer, "times", lambda self: [(name, 1e-4) for name, _ in times(self)])
    kept: list[Tensor] = []
    counts: list[int] = []

    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        scores = model(x)
        loss = F.cross_entropy(scores, y)
        kept.append(scores.mean(0).relu().detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        counts.append(sum(isinstance(item, Call) for item in gc.get_objects()))
        return float(loss.detach()).hex()

    assert_same(scaled, spill_dir, loop)
    under_lms = counts[-STEPS:]
    assert max(under_lms[-3:]) <= max(under_lms[:4]), "calls of steps that are over are still there"


def tabled(
    write: Callable[[Tensor], object], times: int = 0
) -> tuple[Callable[[nn.Module, Tensor], Tensor], Loop]:
    """Layers that read a table which is no parameter and no buffer, so that only recipes ask for it, and a
    loop that from some planned step on has it written between forward and backward; ``times`` before."""

    tables: list[Tensor] = []

    def middle(model: nn.Module, x: Tensor) -> Tensor:
        return torch.sin(x + tables[-1]) * torch.cos(tables[-1])

    def loop(model: Trap, optimizer: torch.optim.Optimizer, step: int) -> str:
        x, y = batch(step)
        if step == 0:
            tables.append(torch.linspace(-1, 1, 512 * 64).view(512, 64))
            for _ in range(times):
                tables[-1].add_(1)
        loss = F.cross_entropy(model(x), y)
        if step >= STEPS - 3:
            write(tables[-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach()).hex()

    return middle, loop


TABLE_WRITES: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda table: table.add_(0.01),
    "detached": lambda table: table.detach().add_(0.01),
    "a view": lambda table: table.detach().view(-1)[::2].add_(0.01),
    "through data": lambda table: table.data.add_(0.01),
    "no write, only another tensor there": lambda table: torch.empty(0).set_(table),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("write", TABLE_WRITES.values(), ids=TABLE_WRITES)
def test_a_source_that_only_recipes_hold_may_be_written(
    write: Callable[[Tensor], object], spill_dir: Path
) -> None:
    """Again and again: it is no longer at version 0 when it is read."""
    middle, loop = tabled(write)
    stats = assert_same(middle, spill_dir, loop)
    assert stats["replayed_ops"]


def test_a_source_that_was_written_before_is_as_good_as_any(spill_dir: Path) -> None:
    replays = [
        assert_same(middle, spill_dir, loop)["replayed_ops"]
        for middle, loop in (tabled(lambda table: None), tabled(lambda table: None, times=3))
    ]
    assert replays[0] == replays[1] != 0


def test_a_source_that_only_recipes_hold_is_written_unseen(spill_dir: Path) -> None:
    def elsewhere(table: Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: table.add_(0.01)).result()

    middle, loop = tabled(elsewhere)
    with pytest.raises(torchlms.ReplayFailed, match="was written after it was read"):
        train(middle, spill_dir, loop)


class Conjugated(nn.Module):
    """Writes what it saved last, through ``.data`` and a view that ops see as conjugated or negated: from
    some planned step on to other numbers, which no version tells."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(64, 64, dtype=torch.cfloat) / 8 for _ in range(6))
        self.part, self.calls = part, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for weight in self.layers:
            y = torch.sin(x @ weight)
            self.part(y.data).mul_(1.0 if self.calls < STEPS - 2 else 0.9)
            x = y * torch.cos(y)
        return torch.view_as_real(x)


@pytest.mark.parametrize(
    "part", [lambda y: y.conj(), lambda y: y.conj().imag, lambda y: y.imag], ids=["conj", "neg", "imag"]
)
def test_a_write_through_a_view_that_cannot_be_told_of(
    part: Callable[[Tensor], Tensor], spill_dir: Path
) -> None:
    def losses(lms: bool) -> tuple[list[str], Tensor, int]:
        torch.manual_seed(0)
        model = Conjugated(part)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options = {"budget": 2_200_000, "disk_dir": spill_dir, "rules": DROPPING}
        with torchlms.LMS(model, optimizer, **options) if lms else contextlib.nullcontext() as entered:
            said = []
            for _ in range(STEPS):
                loss = model(torch.randn(256, 64).to(torch.cfloat) * 0.2).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                said.append(float(loss.detach()).hex())
            replays = entered.stats()["replayed_ops"] if entered is not None else 0
        gradient = model.layers[0].grad
        assert gradient is not None
        return said, torch.view_as_real(gradient), replays

    plain, gradient, _ = losses(lms=False)
    ours, other, replays = losses(lms=True)
    assert replays
    assert ours == plain
    assert torch.equal(gradient, other)


def test_a_generator_that_is_given_by_position() -> None:
    given = torch.Generator()
    x, noise = torch.ones(3), torch.zeros(3)
    args = (x, noise, 0.1, 0.3, True, given)
    assert generator_of(torch.ops.aten.rrelu_with_noise.default, args, {}, x.device) is given
    assert (
        generator_of(torch.ops.aten.rrelu_with_noise.default, args[:5], {}, x.device)
        is torch.default_generator
    )


def test_running_statistics_that_no_schema_tells_of() -> None:
    mean, variance = torch.zeros(3), torch.ones(3)
    args = (torch.randn(4, 3), mean, variance, 0.1)
    written = list(written_tensors(torch.ops.aten.batch_norm_update_stats.default, args, {}))
    assert written[0] is mean
    assert written[1] is variance
    torch.ops.aten.batch_norm_update_stats(*args)
    assert float(variance[0]) != 1.0
