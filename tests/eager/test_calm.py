"""Calm backward passes: where nothing can run out, a node's ops go unseen once it has asked for a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import Session, new_session, open_lms, outcome, plain_peak, plain_step, run_plain
from small_networks import NETWORKS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchlms.eager import private
from torchlms.eager.engine import Engine
from torchlms.eager.watcher import Watcher

STEPS = 8
DETACH = torch.ops.aten.detach.default


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that follow a program do so as on a device, where nobody counts results in a ledger."""
    begin = Engine.begin_microstep

    def plainly(engine: Engine, first: Tensor) -> None:
        begin(engine, first)
        now = engine.now
        if now.follower is not None and now.timer is None:
            now.plainly = True
            now.look_ahead()
            now.calm_from = engine._calm_from(now.follower.program)

    monkeypatch.setattr(Engine, "begin_microstep", plainly)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that somebody looks away."""
    found: list[int] = []
    look_away = private.look_away

    def noted() -> None:
        found.append(1)
        look_away()

    monkeypatch.setattr(private, "look_away", noted)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The ops that come by."""
    ops: list[Any] = []
    run = Watcher.run

    def noted(self: Watcher, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ops.append(func)
        return run(self, func, args, kwargs)

    monkeypatch.setattr(Watcher, "run", noted)
    return ops


def trained(network: str, share: float, spill_dir: Path, **options: Any) -> None:
    """The bits are those of a plain run."""
    budget_bytes = int(share * plain_peak(NETWORKS[network]))
    session = new_session(NETWORKS[network])
    with open_lms(session, budget_bytes, spill_dir, **options):
        for step in range(STEPS):
            plain_step(session, step)
    assert outcome(session).differences(run_plain(NETWORKS[network], steps=STEPS)) == []


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("rules", [{}, {"recompute": False}], ids=["joint", "moving alone"])
@pytest.mark.parametrize("share", [0.95, 0.7])
def test_same_bits(
    network: str, share: float, rules: dict[str, Any], spill_dir: Path, looks: list[int]
) -> None:
    trained(network, share, spill_dir, rules={"min_bytes": 1024, **rules})
    assert looks


class Middle(nn.Module):
    """Asks ``look`` at each forward pass; several layers with something to save."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        self.middle: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.middle(layer(x).sin().exp())
        return x


def steps(model: Middle, spill_dir: Path, step: Callable[[Tensor], None], **options: Any) -> None:
    import torchlms

    torch.manual_seed(0)
    with torchlms.LMS(model, budget="1GiB", disk_dir=spill_dir, **options):
        for _ in range(6):
            step(model(torch.randn(64, 32)).square().mean())
            model.zero_grad()


@pytest.mark.usefixtures("device")
def test_what_a_node_runs_then_goes_unseen_and_the_rest_does_not(
    spill_dir: Path, looks: list[int], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, list[Any]] = {}

    def step(loss: Tensor) -> None:
        del seen[:], looks[:]
        loss.backward()
        counts["calm" if looks else "watched"] = list(seen)
        del seen[:]
        torch.ones(1)
        assert seen, "it comes by again"

    steps(Middle(), spill_dir, step)
    calm, watched = counts["calm"], counts["watched"]
    assert calm.count(DETACH) < watched.count(DETACH)
    unseen = {torch.ops.aten.mm.default, torch.ops.aten.cos.default}
    assert unseen <= set(watched)
    assert unseen.isdisjoint(calm)
    assert torch.ops.aten.detach.default in calm, "where gradients are added up"


class Other(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return func(*args, **(kwargs or {}))


class Foreign(Tensor):
    """Saved like any other; its ops may have a dispatch of their own."""


def backward_under(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Tensor], None]:
    def step(loss: Tensor) -> None:
        with context():
            loss.backward()

    return step


def differentiable(loss: Tensor) -> None:
    loss.backward(create_graph=True)


def foreign(x: Tensor) -> Tensor:
    return (x * torch.ones(1).as_subclass(Foreign)).as_subclass(Tensor)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("step", "middle", "options"),
    [
        (backward_under(Other), None, {}),
        (differentiable, None, {}),
        (backward_under(nullcontext), foreign, {}),
        (backward_under(nullcontext), None, {"verify": 1}),
        (backward_under(nullcontext), None, {"rules": {"held": True}}),
    ],
    ids=["another mode", "create_graph", "tensors of another make", "verify", "held"],
)
def test_nobody_looks_away_where_somebody_has_to_see(
    step: Callable[[Tensor], None],
    middle: Callable[[Tensor], Tensor] | None,
    options: dict[str, Any],
    spill_dir: Path,
    looks: list[int],
) -> None:
    model = Middle()
    if middle is not None:
        model.middle = middle
    steps(model, spill_dir, step, **options)
    assert not looks


@pytest.fixture
def calm_engine(device: None, spill_dir: Path) -> Iterator[tuple[Session, Engine]]:
    budget_bytes = 2 * plain_peak(NETWORKS["mlp"])
    session = new_session(NETWORKS["mlp"])
    with open_lms(session, budget_bytes, spill_dir) as lms:
        for step in range(4):
            plain_step(session, step)
        assert lms._engine is not None
        yield session, lms._engine


def _dropped(engine: Engine) -> None:
    engine.dropped.add(-1)


def _more(engine: Engine) -> None:
    follower = engine.now.follower
    assert follower is not None
    follower.program.before_bytes = -engine.ladder.budget_bytes


@pytest.mark.parametrize("happens", [None, _dropped, _more], ids=["nothing", "dropped", "more memory"])
def test_nor_where_writes_matter_or_memory_is_short(
    happens: Callable[[Engine], None] | None, calm_engine: tuple[Session, Engine], looks: list[int]
) -> None:
    session, engine = calm_engine
    plain_step(session, 4)
    assert looks
    del looks[:]
    if happens is not None:
        happens(engine)
    plain_step(session, 5)
    engine.dropped.discard(-1)
    assert bool(looks) is (happens is None)


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x * 2)
        return x * 3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        if Raises.on:
            raise ArithmeticError("in a node that went unseen")
        return grads[0] * saved

    on = False


@pytest.mark.usefixtures("device")
def test_an_exception_in_such_a_node_leaves_the_mode_on(
    spill_dir: Path, looks: list[int], seen: list[Any]
) -> None:
    model = Middle()
    model.middle = Raises.apply
    count = iter(range(100))

    def step(loss: Tensor) -> None:
        Raises.on = next(count) == 4
        del looks[:]
        if Raises.on:
            with pytest.raises(ArithmeticError):
                loss.backward()
            assert looks
        else:
            loss.backward()
        del seen[:]
        torch.ones(1)
        assert seen

    steps(model, spill_dir, step)


class Twice(Tensor):
    """A tensor with a dispatch of its own, such as one of eight bits that a Function makes for a product."""

    calls = 0

    @staticmethod
    def __new__(cls, inner: Tensor) -> Twice:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Twice.calls += 1
        return func(*(item.inner if isinstance(item, Twice) else item for item in args), **(kwargs or {}))


class OwnDispatch(torch.autograd.Function):
    """Saves plain tensors; its backward pass uses a mode and a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        with Other():
            return torch.mul(Twice(saved), grads[0])


@pytest.mark.usefixtures("device")
def test_somebodys_own_function_keeps_its_own_dispatch(spill_dir: Path, looks: list[int]) -> None:
    model = Middle()
    model.middle = lambda x: OwnDispatch.apply(x * 0.1)
    counts = []

    def step(loss: Tensor) -> None:
        before = Twice.calls
        loss.backward()
        counts.append(Twice.calls - before)

    steps(model, spill_dir, step)
    assert counts == [6] * 6
    assert looks, "in the other nodes"
