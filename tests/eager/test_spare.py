"""What only recipes hold: it leaves where memory runs out, and nothing is held that no recipe needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sessions
import torch
from sessions import bits
from torch import Tensor, nn

import torchlms
from torchlms.bench.peak import LedgerMode
from torchlms.eager import engine as engine_module
from torchlms.eager.watcher import Watcher
from torchlms.memory.ledger import Ledger

STEPS = 8
RULES = {"min_bytes": 1024}


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """On which nothing leaves that can be made again."""
    sessions.slow_disk(monkeypatch)


class Shift(nn.Module):
    """Autograd does not save the sum with the buffer's left side: a recipe has it held."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(64))
        self.register_buffer("shift", torch.randn(512, 64))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = ((x + self.bias).tanh() + self.shift).sigmoid()
        return result


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    model = nn.Sequential(*[layer for _ in range(6) for layer in (Shift(), nn.Linear(64, 64))])
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    between: Callable[[nn.Module], None],
    after: Callable[[nn.Module], None] = lambda model: None,
) -> Iterator[str]:
    for _ in range(STEPS):
        loss = model(torch.randn(512, 64)).square().mean()
        optimizer.zero_grad()
        between(model)
        loss.backward()
        optimizer.step()
        after(model)
        yield loss.item().hex()


def shifts(model: nn.Module) -> list[Tensor]:
    return [layer.shift for layer in model.modules() if isinstance(layer, Shift)]


def write_all(model: nn.Module) -> None:
    """What the forward pass has read, and autograd has not saved, is written before backward."""
    new = [shift * 1.01 for shift in shifts(model)]
    for shift, other in zip(shifts(model), new, strict=True):
        shift.copy_(other)


def left(model: nn.Module) -> list[str]:
    return [bits(tensor) for tensor in model.state_dict().values()]


def plain(*acts: Callable[[nn.Module], None]) -> tuple[list[str], list[str], int]:
    model, optimizer = network()
    ledger = Ledger()
    mode = LedgerMode(ledger, torch.device("cpu"))
    mode.count([*model.parameters(), *model.buffers()])
    with mode:
        losses = list(train(model, optimizer, *acts))
    return losses, left(model), ledger.peak_bytes


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("share", [0.54, 0.56, 0.58, 0.6, 0.62])
def test_it_leaves_where_memory_runs_out(share: float, spilled: Path) -> None:
    losses, state, peak_bytes = plain(write_all)
    model, optimizer = network()
    budget = int(share * peak_bytes)
    with torchlms.LMS(model, optimizer, budget=budget, disk_dir=spilled, rules=RULES) as lms:
        assert list(train(model, optimizer, write_all)) == losses
        assert (lms.stats()["replayed_ops"] > 0) is (share > 0.57)
        engine = lms._engine
        assert engine is not None
    assert left(model) == state
    assert not list(engine.spare())


class Long(nn.Module):
    """Of all that it computes autograd saves the first result and the last."""

    def forward(self, x: Tensor) -> Tensor:
        result = x.exp()
        for _ in range(4):
            result = result * 0.5 + 0.1
        return result.tanh()


@pytest.mark.usefixtures("slow_disk")
def test_what_is_made_on_the_way_goes_with_its_last_reader(
    spilled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(64, 64), Long())])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run_again, replay = Watcher.run_again, engine_module.replay
    present: list[list[int]] = []

    def beginning(*args: Any) -> Any:
        present.append([])
        return replay(*args)

    def measured(self: Watcher, *args: Any) -> Any:
        result = run_again(self, *args)
        present[-1].append(self._device.allocated_bytes())
        return result

    monkeypatch.setattr(engine_module, "replay", beginning)
    monkeypatch.setattr(Watcher, "run_again", measured)
    with torchlms.LMS(model, optimizer, budget="1100KiB", disk_dir=spilled, rules=RULES) as lms:
        for _ in range(4):
            model(torch.randn(512, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert lms.stats()["replayed_ops"] > 0
    long = [sizes for sizes in present if len(sizes) == 9]
    assert long
    assert max(max(sizes) - sizes[0] for sizes in long) <= 512 * 64 * 4, "one more than after the first op"


def wide() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(128, 128), nn.Tanh())])
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def wide_steps(model: nn.Module, optimizer: Any, when: str) -> Iterator[str]:
    for _ in range(STEPS):
        loss = model(torch.randn(256, 128)).square().mean()
        optimizer.zero_grad()
        if when == "before backward":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        loss.backward()
        optimizer.step()
        if when == "after the update":
            for parameter in model.parameters():
                parameter.data = parameter.data.clamp(-0.5, 0.5)
        yield loss.item().hex()


@pytest.mark.parametrize(
    ("when", "share"), [("after the update", 0.65), ("after the update", 0.7), ("before backward", 0.7)]
)
def test_parameters_that_were_replaced_are_let_go(when: str, share: float, spilled: Path) -> None:
    model, optimizer = wide()
    ledger = Ledger()
    mode = LedgerMode(ledger, torch.device("cpu"))
    mode.count(list(model.parameters()))
    with mode:
        losses = list(wide_steps(model, optimizer, when))
    model, optimizer = wide()
    budget = int(share * ledger.peak_bytes)
    with torchlms.LMS(model, optimizer, budget=budget, disk_dir=spilled, rules=RULES):
        assert list(wide_steps(model, optimizer, when)) == losses


def test_a_refusal_comes_out_of_load_state_dict(spilled: Path) -> None:
    """Which gathers errors as words, and raises one of its own."""
    model, optimizer = network()

    def loop() -> None:
        with torchlms.LMS(model, optimizer, budget="3MiB", disk_dir=spilled, rules=RULES) as lms:
            state = {name: _Bulky(tensor) for name, tensor in model.state_dict().items()}
            model(torch.randn(512, 64)).sum().backward()
            engine = lms._engine
            assert engine is not None
            engine.ladder.budget_bytes = 1 << 10  # so that the next op finds no room
            model.load_state_dict(state)

    with pytest.raises(torchlms.BudgetTooSmall) as refused:
        loop()
    assert refused.value.smallest_bytes > 0
    assert isinstance(refused.value.__cause__, RuntimeError)


class _Bulky(torch.Tensor):
    """A tensor that takes memory where it is copied from."""

    @staticmethod
    def __new__(cls, tensor: Tensor) -> _Bulky:
        made: _Bulky = tensor.detach().as_subclass(cls)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.copy_:
            torch.empty(1 << 20)
        return super().__torch_function__(func, types, args, kwargs or {})
