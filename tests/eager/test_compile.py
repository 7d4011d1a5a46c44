"""Compiled regions are opaque, and stay compiled: R9."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eviction import SIDE, evict, leaves, open_wide
from sessions import bits, new_session, open_lms, outcome, plain_peak
from small_networks import NETWORKS
from torch import Tensor, nn
from torch._dynamo.decorators import skip
from torch._dynamo.utils import counters

import torchlms


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def hidden(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_part(backend: str, spill_dir: Path) -> None:
    """Same bits, compiled as often as without LMS, and still compiled when LMS has gone."""
    network = NETWORKS["mlp"]
    graphs: list[int] = []

    def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(1)
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    def train(budget: int | None) -> tuple[Any, int, int]:
        torch._dynamo.reset()
        counters.clear()
        graphs.clear()
        session = new_session(network)
        layers = session.model.layers
        assert isinstance(layers, nn.Sequential)
        middle = layers[9:21]
        compiled = torch.compile(middle, backend=counting)

        def loop(step: int) -> None:
            inputs, target = network.batch(step)
            session.optimizer.zero_grad()
            loss = F.cross_entropy(layers[21:](compiled(layers[:9](inputs))), target)
            loss.backward()
            session.optimizer.step()
            session.note(loss)

        moved = 0
        if budget is None:
            for step in range(6):
                loop(step)
        else:
            with open_lms(session, budget, spill_dir) as lms:
                for step in range(6):
                    loop(step)
                moved = lms.stats()["bytes_out_per_step"]
        inside = len(graphs)
        loop(6)  # nothing is compiled anew when LMS has gone
        skipped = sum(counters["graph_break"].values())
        assert len(graphs) == inside
        return (outcome(session), inside, skipped), moved, inside

    plain, _, compiled_plainly = train(None)
    planned, moved, _ = train(int(0.6 * plain_peak(network)))
    assert planned == plain
    assert moved > 0
    assert compiled_plainly == 1


def test_compiling_works_after_lms(spill_dir: Path) -> None:
    with open_wide(spill_dir):
        x, w = leaves()
        hidden(x, w).sum().backward()
    graphs: list[int] = []

    def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(1)
        return module

    compiled = torch.compile(hidden, backend=counting)
    assert bits(compiled(*leaves())) == bits(hidden(*leaves()))
    assert graphs == [1]


@skip
def passed_over(h: Tensor) -> Tensor:
    """The compiler compiles nothing here, but looks at every Python function that is called from here."""
    return (h.sin() * h).exp()


def in_pieces(x: Tensor, w: Tensor) -> Tensor:
    return hidden(passed_over(hidden(x, w)) / SIDE, w).exp()


def test_eager_pieces_between_compiled_ones(spill_dir: Path) -> None:
    """Our hooks and our mode are called there, and must not be compiled themselves."""
    graphs: list[int] = []

    def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(1)
        return module

    def run(lms: torchlms.LMS | None) -> tuple[list[list[str]], int]:
        torch._dynamo.reset()
        graphs.clear()
        compiled = torch.compile(in_pieces, backend=counting)
        found = []
        for _ in range(12):  # more often than the compiler tries again
            x, w = leaves()
            loss = compiled(x, w).sum()
            assert lms is None or evict(lms) > 0
            loss.backward()
            assert x.grad is not None
            assert w.grad is not None
            found.append([bits(loss), bits(x.grad), bits(w.grad)])
        return found, len(graphs)

    plain = run(None)
    with warnings.catch_warnings(record=True) as warned, open_wide(spill_dir) as lms:
        assert run(lms) == plain
    assert not [item for item in warned if "trace" in str(item.message)], "it compiled what is ours"
    assert len({tuple(item) for item in plain[0]}) == 1
    assert not any("torchlms" in reason for reason in counters["graph_break"])


def test_a_compiled_model_given_to_lms(spill_dir: Path) -> None:
    """One opaque piece: what it saved leaves when its forward pass has ended."""
    network = NETWORKS["mlp"]

    def train(budget: int | None) -> Any:
        torch._dynamo.reset()
        session = new_session(network)
        session.model = torch.compile(session.model, backend="aot_eager")  # type: ignore[assignment]

        def step(index: int) -> None:
            inputs, target = network.batch(index)
            session.optimizer.zero_grad()
            loss = F.cross_entropy(session.model(inputs), target)
            loss.backward()
            session.optimizer.step()
            session.note(loss)

        if budget is None:
            for index in range(6):
                step(index)
            return outcome(session)
        rules = {"move_ops": ("*",), "min_bytes": 0}
        with open_lms(session, budget, spill_dir, rules=rules) as lms:
            for index in range(6):
                step(index)
            assert lms.stats()["strayed"] == 0
            assert lms.stats()["bytes_out_per_step"] > 0
        return outcome(session)

    assert train(int(1.2 * plain_peak(network))) == train(None)
