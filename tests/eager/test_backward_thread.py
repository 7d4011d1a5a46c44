"""What is done as a backward pass would do it: it runs in one, and nobody else notices."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import DROPPING, plain_peak, run_lms, run_plain, slow_disk
from small_networks import NETWORKS
from traps import STEPS

from torchlms.eager import backward_thread, private, proof
from torchlms.eager.backward_thread import run_as_backward
from torchlms.errors import ReplayFailed

CPU = torch.device("cpu")


def as_backward(deed: Any) -> Any:
    """Also on a CPU, where no other thread would run it."""
    return backward_thread._as_backward(CPU, deed)


def test_it_runs_inside_a_backward_pass() -> None:
    assert as_backward(private.in_backward)
    assert not private.in_backward()


def test_on_a_cpu_it_runs_here_and_now() -> None:
    assert not run_as_backward(CPU, private.in_backward)


def test_on_a_gpu_it_runs_as_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_thread, "_as_backward", lambda device, deed: (device.type, deed()))
    assert run_as_backward(torch.device("cuda", 0), lambda: 3) == ("cuda", 3)


@pytest.mark.parametrize("error", [ReplayFailed, torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_it_raises_is_raised(error: type[BaseException]) -> None:
    def deed() -> None:
        raise error("in the deed")

    with pytest.raises(error, match="in the deed"):
        as_backward(deed)


def test_nothing_is_left_of_it() -> None:
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)
    with pytest.raises(ValueError, match="in the deed"):
        as_backward(lambda held=held: (_ for _ in ()).throw(ValueError("in the deed")))
    del held
    gc.collect()
    assert gone() is None


def test_hooks_and_gradient_modes_of_the_program_do_not_matter() -> None:
    def never(_: torch.Tensor) -> Any:
        raise AssertionError("nothing is saved for it")

    with torch.autograd.graph.saved_tensors_hooks(never, never), torch.no_grad():
        assert as_backward(lambda: not torch.is_grad_enabled())
        assert not torch.is_grad_enabled()


def test_where_there_can_be_no_backward_pass_it_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)  # nothing is made there
    with torch.inference_mode():
        assert not run_as_backward(cuda, private.in_backward)
    monkeypatch.setattr(private, "compiled_autograd", lambda: True)
    assert not run_as_backward(cuda, private.in_backward)


def test_a_deed_inside_a_backward_pass_is_part_of_that() -> None:
    inside: list[tuple[int, int]] = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            cuda = torch.device("cuda", 0)
            inside.append((private.graph_task(), run_as_backward(cuda, private.graph_task)))
            return grad

    torch.autograd.backward(Node.apply(torch.ones(1, requires_grad=True)))
    assert inside
    assert all(outer == inner for outer, inner in inside)


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_recipes_are_tried_like_that(name: str, monkeypatch: pytest.MonkeyPatch, spill_dir: Path) -> None:
    """With the same bits, within the budget, and without a step that seems to have begun or ended there."""
    slow_disk(monkeypatch)
    tried: list[bool] = []

    def spied(device: torch.device, deed: Any) -> Any:
        tried.append(private.in_backward())
        return backward_thread._as_backward(device, deed)

    monkeypatch.setattr(proof, "run_as_backward", spied)
    network = NETWORKS[name]
    budget_bytes = plain_peak(network) // 2
    watched = run_lms(network, budget_bytes, spill_dir, steps=STEPS, rules=DROPPING)
    assert watched.outcome.differences(run_plain(network, steps=STEPS)) == []
    assert watched.stats["replayed_ops"] > 0
    assert watched.stats["strayed"] == 0
    assert watched.peak_bytes <= budget_bytes
    assert tried
    assert not all(tried)
