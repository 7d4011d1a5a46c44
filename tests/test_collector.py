"""Python's collector of cycles passes by what lasts, and looks between two steps rather than within one."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import torchlms
from torchlms.eager.collector import SparedCollector

pytestmark = pytest.mark.usefixtures("unfrozen")


@pytest.mark.parametrize("at_first", [0, 300], ids=["", "Python 3.12 freezes some objects itself"])
def test_the_collector_passes_by_what_was_there_before(
    at_first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = gc.get_freeze_count
    monkeypatch.setattr(gc, "get_freeze_count", lambda: at_first + count())
    model = torch.nn.Linear(4, 4)
    with torchlms.LMS(model, budget="1GiB", disk_dir=tmp_path):
        assert count() > 10_000
    assert count() == 0


def test_a_collector_that_somebody_else_froze_is_left_alone(tmp_path: Path) -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with torchlms.LMS(torch.nn.Linear(4, 4), budget="1GiB", disk_dir=tmp_path):
        assert gc.get_freeze_count() == before
    assert gc.get_freeze_count() == before


@pytest.mark.parametrize(
    ("count", "enabled", "looks"), [(4, True, False), (5, True, True), (9, True, True), (9, False, False)]
)
def test_it_looks_when_a_full_collection_is_due_soon(
    count: int, enabled: bool, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    with ExitStack() as undo:
        collector = SparedCollector()
        monkeypatch.setattr(gc, "get_threshold", lambda: (700, 10, 10))
        monkeypatch.setattr(gc, "set_threshold", lambda *counts: None)
        collector.put_on(undo)
        monkeypatch.setattr(gc, "get_count", lambda: (0, 0, count))
        monkeypatch.setattr(gc, "isenabled", lambda: enabled)
        monkeypatch.setattr(gc, "collect", lambda: looked.append(1))
        collector.look_now()
    assert bool(looked) is looks


def test_no_full_collection_within_a_step(tmp_path: Path) -> None:
    """With these thresholds several would come in every step of this network."""
    layers = (layer for _ in range(30) for layer in (torch.nn.Linear(256, 256), torch.nn.GELU()))
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.randn(256, 256)
    looks = {"within": 0, "between": 0}
    where = "between"

    def enter(*_: Any) -> None:
        nonlocal where
        where = "within"

    def note(phase: str, info: dict[str, Any]) -> None:
        looks[where] += phase == "start" and info["generation"] == 2

    def step() -> None:
        nonlocal where
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        where = "between"
        optimizer.step()

    with torchlms.LMS(model, optimizer, budget="16MiB", disk_dir=tmp_path) as lms:
        for _ in range(6):
            step()
        plan = lms.plan
    assert plan is not None
    assert plan.moves

    model[2].register_forward_pre_hook(enter)  # by then the step before is over
    usual = gc.get_threshold()
    gc.set_threshold(20, 4, 10)
    try:
        # With a plan that is given: making another one takes objects as well, some of them within a step.
        with torchlms.LMS(model, optimizer, budget="16MiB", disk_dir=tmp_path, plan=plan) as lms:
            for _ in range(6):
                step()
            assert lms.stats()["plan"], "it follows the plan"
            gc.callbacks.append(note)
            for _ in range(8):
                step()
            gc.callbacks.remove(note)
        assert gc.get_threshold() == (20, 4, 10)
    finally:
        gc.set_threshold(*usual)
    assert looks["between"] or not usual[2]
    assert not looks["within"]


def test_thresholds_that_the_program_sets_meanwhile_stay(tmp_path: Path) -> None:
    usual = gc.get_threshold()
    try:
        with torchlms.LMS(torch.nn.Linear(4, 4), budget="1GiB", disk_dir=tmp_path):
            gc.set_threshold(500, 5, 5)
        assert gc.get_threshold() == (500, 5, 5)
    finally:
        gc.set_threshold(*usual)


class Trainer:
    """Holds its own bound method, as trainers do: it goes when the collector finds it, and not before."""

    def __init__(self, width: int) -> None:
        layers = [layer for _ in range(6) for layer in (torch.nn.Linear(width, width), torch.nn.Tanh())]
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.hooks = [self.train]

    def train(self, batch: torch.Tensor) -> None:
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_what_lay_in_cycles_makes_room_for_what_comes_after_it(tmp_path: Path) -> None:
    """The collector has passed by each of these models, and two at once leave no room for a third."""
    alive: list[weakref.ref[torch.nn.Module]] = []
    torchlms.enable(budget="12MiB", disk_dir=tmp_path, rules={"min_bytes": 4096}, device="cpu")
    try:
        for fold in range(4):
            trainer = Trainer(256 + fold)
            alive.append(weakref.ref(trainer.model))
            for _ in range(8):
                trainer.train(torch.randn(512, 256 + fold))
            del trainer
        assert sum(model() is not None for model in alive) <= 2
    finally:
        torchlms.disable()
