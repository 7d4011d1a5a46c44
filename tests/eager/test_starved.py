"""A convolution that cuDNN had no room for: whoever runs it hears of it at once, though nothing raised."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torchlms
from torchlms.eager import convolution
from torchlms.eager.convolution import ConvolutionRoom
from torchlms.eager.engine import Engine
from torchlms.eager.refusals import Refusals
from torchlms.eager.sizes import ResultSizes
from torchlms.eager.watcher import Watcher
from torchlms.errors import BudgetTooSmall, ReplayFailed
from torchlms.memory.device import CpuDevice
from torchlms.memory.ledger import Ledger

CONVOLUTION = torch.ops.aten.convolution.default


def arguments() -> tuple[Any, ...]:
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    return (x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_KNOWN_BLOCKS", {})
    monkeypatch.setattr(convolution, "_CHOSEN_SHORT", set())


class Stage:
    """A watcher on what says that it is CUDA, where ``hidden`` allocations fail inside each op."""

    def __init__(self, hidden: int, *, known: bool = True) -> None:
        sizes = ResultSizes()
        self.hidden = hidden
        self.asked = 0
        self.ladder = SimpleNamespace(
            ooms=0,
            budget_bytes=1 << 20,
            reserve=lambda blocks, operands, refusing: True,
            refusals=Refusals(CpuDevice(Ledger()), sizes),
        )
        self.rooms = ConvolutionRoom(sizes)
        self.now = SimpleNamespace(
            clock=0, plainly=False, recorder=None, timer=None, learning=False, routine=None, strayed=False
        )
        engine = SimpleNamespace(
            device=SimpleNamespace(is_cuda=True, torch_device=torch.device("cuda", 0)),
            dead=False,
            guard=SimpleNamespace(inside=False),
            holes=None,
            accounts=None,
            sizes=sizes,
            rooms=self.rooms,
            ladder=self.ladder,
            lent=SimpleNamespace(any=False),
            replays=0,
            prover=SimpleNamespace(busy=False),
            now=self.now,
            module_here=lambda: "layer1",
            hidden_ooms=self._hidden_ooms,
        )
        self.watcher = Watcher(engine)  # type: ignore[arg-type]
        if known:
            self.rooms.learn(CONVOLUTION, arguments(), {}, 1 << 16)

    def _hidden_ooms(self, *, here: bool) -> int:
        """Asked before an op and after it."""
        self.asked += 1
        return (self.asked - 1) * self.hidden - self.ladder.ooms

    def run(self) -> torch.Tensor:
        result: torch.Tensor = self.watcher._run(self.now, CONVOLUTION, arguments(), {})  # type: ignore[arg-type]
        return result

    def run_again(self) -> torch.Tensor:
        result: torch.Tensor = self.watcher.run_again(CONVOLUTION, arguments(), {})
        return result


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def test_it_is_said_once_for_each_place(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(hidden=2)
    with caplog.at_level(logging.WARNING, "torchlms"):
        stage.run()
        stage.run()
    assert [record.getMessage() for record in caplog.records if "layer1" in record.getMessage()]
    assert len(caplog.records) == 1
    assert stage.rooms.starved == 2
    assert stage.ladder.ooms == 4  # so that nobody counts them once more


def test_without_room_it_is_an_error_where_determinism_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(hidden=0)
    stage.ladder.reserve = lambda blocks, operands, refusing: False
    stage.rooms.learn(CONVOLUTION, arguments(), {}, 3 << 30)
    for _ in range(3):
        stage.run()
    said = [record.getMessage() for record in caplog.records if "no room" in record.getMessage()]
    assert len(said) == 1, "once, not at every step"
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with pytest.raises(BudgetTooSmall, match="deterministic ones were asked for") as refused:
        stage.run()
    assert refused.value.smallest_bytes > 3 << 30


def test_with_deterministic_kernels_it_is_refused(deterministic: None) -> None:
    stage = Stage(hidden=1)
    with pytest.raises(BudgetTooSmall, match="cuDNN would take another algorithm"):
        stage.run()


def test_what_is_made_again_has_the_bits_of_forward_or_is_not_made(deterministic: None) -> None:
    stage = Stage(hidden=1)
    with pytest.raises(ReplayFailed, match="may give other bits"):
        stage.run_again()


def test_while_a_recipe_is_tried_its_bytes_decide(deterministic: None) -> None:
    stage = Stage(hidden=1)
    stage.watcher._engine.prover.busy = True
    assert stage.run_again().shape == (2, 4, 8, 8)
    assert stage.rooms.starved == stage.ladder.ooms == 1  # and counted it is


def test_one_that_chose_while_memory_was_short_may_find_it_short_again(
    deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread that has not met it, where it chooses as it did the first time."""
    stage = Stage(hidden=1, known=False)
    right = Watcher._attempt
    monkeypatch.setattr(Watcher, "_run_new_convolution", right)
    stage.run()
    stage.rooms.learn(CONVOLUTION, arguments(), {}, 1 << 16)
    stage.run()
    assert stage.rooms.starved == 2


def test_what_runs_again_after_an_error_has_chosen_nothing_unless_it_chooses_twice() -> None:
    stage = Stage(hidden=1)
    workspaces = stage.watcher._workspaces
    workspaces.make_room(CONVOLUTION, arguments(), {})
    workspaces.begin_again(CONVOLUTION)
    assert stage.ladder.ooms == 1
    workspaces.begin_again(torch.ops.aten.convolution_backward.default)
    assert stage.ladder.ooms == 1


def test_failures_that_did_no_harm_are_not_hidden() -> None:
    engine = SimpleNamespace(
        _allocator_ooms=lambda here: 7, ladder=SimpleNamespace(ooms=2), holes=SimpleNamespace(ooms=4)
    )
    assert Engine.hidden_ooms(engine) == 1  # type: ignore[arg-type]


def test_what_keeps_memory_in_order_is_what_holes_hold() -> None:
    with torchlms.LMS(device="cpu", budget="1 GiB") as lms:
        engine = lms._engine
        assert engine is not None
        assert engine.ladder._give_back == engine.holes.untuck


def test_where_any_kernel_will_do_it_is_only_said(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(hidden=1)
    with caplog.at_level(logging.WARNING, "torchlms"):
        stage.run_again()
    assert len(caplog.records) == 1
    assert stage.rooms.starved == 1


def test_one_with_room_is_only_run(caplog: pytest.LogCaptureFixture, deterministic: None) -> None:
    stage = Stage(hidden=0)
    x, w, *_ = args = arguments()
    made = stage.watcher.run_again(CONVOLUTION, args, {})
    assert torch.equal(made, F.conv2d(x, w, padding=1))
    assert stage.run().shape == (2, 4, 8, 8)
    assert stage.rooms.starved == stage.ladder.ooms == 0
    assert not caplog.records


@pytest.mark.parametrize("inputs_first", [False, True])
def test_the_room_for_two_gradients_holds_the_workspace_of_either(
    inputs_first: bool,
) -> None:
    """Each is made with a workspace of its own, the first of them before there is any of the second."""
    x, w, *_ = arguments()
    grad = torch.randn(2, 4, 8, 8)
    backward = torch.ops.aten.convolution_backward.default
    args = (grad, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    workspaces = (1 << 20, 1 << 16) if inputs_first else (1 << 16, 1 << 20)
    inputs, weights = x.numel() * 4, w.numel() * 4
    peak = max(inputs + workspaces[0], inputs + weights + workspaces[1])
    rooms = ConvolutionRoom(ResultSizes())
    rooms.learn(backward, args, {}, peak - inputs - weights)
    blocks, measured = rooms.need(backward, args, {})
    assert measured
    assert blocks[:2] == (inputs, weights)
    assert max(workspaces) <= blocks[2] <= max(workspaces) + weights
