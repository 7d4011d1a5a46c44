"""A budget that cannot work is refused in words that help, and the budget they name works."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import (
    SMALL,
    more,
    new_session,
    open_lms,
    outcome,
    plain_peak,
    plain_step,
    refusal,
    run_lms,
    run_plain,
    smallest_budget,
)
from small_networks import NETWORKS, Network

import torchlms
from torchlms.maker import Maker


@pytest.mark.parametrize("name", ["resnet", "transformer", "mlp", more("lstm"), more("unet3d")])
def test_the_smallest_budget_that_was_named_works(name: str, spill_dir: Path) -> None:
    """Asked again with what the error says, a few times at most, for each step gets further."""
    network = NETWORKS[name]
    budget_bytes = smallest_budget(network, spill_dir)
    watched = run_lms(network, budget_bytes, spill_dir)
    assert watched.outcome.differences(run_plain(network)) == []
    assert watched.peak_bytes <= budget_bytes


def test_once_a_step_was_recorded_whole_its_budget_is_named(spill_dir: Path) -> None:
    with torchlms.LMS(device="cpu", budget="1MiB", disk_dir=spill_dir) as lms:
        assert lms._engine is not None
        lms._engine.ladder.refusals.whole_step_bytes = 5 << 20
        with pytest.raises(
            torchlms.BudgetTooSmall, match=r"for a plan of the whole step, .* 5\.0 MiB"
        ) as raised:
            torch.ones(1 << 20)
        assert raised.value.smallest_bytes == 5 << 20
        with pytest.raises(torchlms.BudgetTooSmall, match="As far as this step got"):
            torch.ones(2 << 20)


def test_what_a_plan_was_said_to_need_is_kept(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ladder got through the recorded step, and no plan of it fits."""

    def refuse(self: Maker, tape: Any, *, rough: bool) -> Any:
        raise torchlms.BudgetTooSmall("on purpose", smallest_bytes=3_000_000)

    monkeypatch.setattr(Maker, "first", refuse)
    session = new_session(NETWORKS["mlp"])
    with open_lms(session, 900_000, spill_dir) as lms:
        plain_step(session, 0)
        plain_step(session, 1)
        assert lms.state == "improvise"
        with pytest.raises(torchlms.BudgetTooSmall, match="for a plan of the whole step") as raised:
            torch.ones(1 << 18)
        assert raised.value.smallest_bytes == 3_000_000
        monkeypatch.undo()
        inputs, target = session.network.batch(0, batch_size=64)
        torch.nn.functional.cross_entropy(session.model(inputs), target).backward()
        with pytest.raises(torchlms.BudgetTooSmall, match="As far as this step got"):
            torch.ones(1 << 18)  # another kind of step


@pytest.mark.parametrize("name", NETWORKS)
def test_a_refusal_is_not_given_lightly(name: str, spill_dir: Path) -> None:
    """At half of the smallest budget that was found nothing works."""
    network = NETWORKS[name]
    assert refusal(network, smallest_budget(network, spill_dir) // 2, spill_dir) is not None


def test_it_names_op_module_and_bytes(spill_dir: Path) -> None:
    network = NETWORKS["resnet"]
    error = refusal(network, 250_000, spill_dir)
    assert error is not None
    text = str(error)
    assert "aten." in text
    assert " in stem.1 " in text or " in blocks." in text, "the module is not named"
    assert "244.1 KiB" in text, "the budget is not named"
    assert f"({error.smallest_bytes} bytes)" in text
    assert "smallest budget" in text
    assert isinstance(error, torchlms.LMSError)


def test_a_single_op_that_is_too_large(spill_dir: Path) -> None:
    with torchlms.LMS(device="cpu", budget="1MiB", disk_dir=spill_dir) as lms:
        small = torch.ones(1000) + 1
        with pytest.raises(torchlms.BudgetTooSmall, match=r"aten\.ones.* 4\.0 MiB of results"):
            torch.ones(1 << 20)
        assert float((small + 1).sum()) == 3000, "and it goes on"
        assert lms.stats()["peak_device_bytes"] <= 1 << 20


def test_a_model_that_is_larger_than_the_budget(spill_dir: Path) -> None:
    session = new_session(NETWORKS["transformer"])
    parameters = sum(parameter.nbytes for parameter in session.model.parameters())
    with (
        pytest.raises(torchlms.BudgetTooSmall, match="in use already") as raised,
        open_lms(session, parameters // 2, spill_dir),
    ):
        pytest.fail("it was let in")
    assert raised.value.smallest_bytes == parameters
    assert torchlms.current() is None


def test_memory_that_is_not_ours_to_move_is_counted(spill_dir: Path) -> None:
    """What the program itself holds takes from the budget; the refusal comes before it is exceeded."""
    kept: list[torch.Tensor] = []

    def hoard(lms: torchlms.LMS) -> None:
        for _ in range(100):
            kept.append(torch.ones(10_000) * 2)
            assert lms.stats()["peak_device_bytes"] <= 1_000_000

    with torchlms.LMS(device="cpu", budget=1_000_000, disk_dir=spill_dir) as lms:
        with pytest.raises(torchlms.BudgetTooSmall):
            hoard(lms)
        assert len(kept) >= 20
        kept.clear()
        assert float(torch.ones(100_000).sum()) == 100_000


def test_after_a_refusal_in_the_middle_training_goes_on(spill_dir: Path) -> None:
    """A batch that is too large is given up; the others train as without it."""
    network, smaller = NETWORKS["mlp"], 256

    def train(budget: int | None, session_dir: Path) -> object:
        session = new_session(network)
        refused = 0

        def step(index: int, size: int) -> None:
            inputs, target = network.batch(index, size)
            session.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(session.model(inputs), target)
            loss.backward()
            session.optimizer.step()
            session.note(loss)

        if budget is None:
            for index in (0, 2, 3, 5, 6):
                step(index, smaller)
            return outcome(session)
        with open_lms(session, budget, session_dir):
            for index in (0, 1, 2, 3, 4, 5, 6):
                generator = torch.get_rng_state()
                try:
                    step(index, 40 * smaller if index in (1, 4) else smaller)
                except torchlms.BudgetTooSmall:
                    refused += 1
                    torch.set_rng_state(generator)
        assert refused == 2
        return outcome(session)

    assert train(600_000, spill_dir) == train(None, spill_dir)


def test_a_guest_in_memory_while_values_come_back(spill_dir: Path) -> None:
    """A prefetch that finds no room is put off; only what is needed now may be refused."""
    network = NETWORKS["mlp"]

    def train(budget: int | None) -> object:
        session = new_session(network)
        layers = session.model.layers
        assert isinstance(layers, torch.nn.Sequential)

        def guest(_: torch.Tensor) -> None:
            taken = torch.zeros(60_000)
            for _ in range(120):  # so many ops that the plan wants many values back meanwhile
                taken[:1] + 1

        def steps() -> None:
            for index in range(6):
                if index:
                    layers[15].weight.register_hook(guest)  # type: ignore[operator]
                plain_step(session, index)

        if budget is None:
            steps()
        else:
            with open_lms(session, budget, spill_dir, rules=SMALL) as lms:
                steps()
                assert lms.stats()["peak_device_bytes"] <= budget
        return outcome(session)

    assert train(int(0.29 * plain_peak(network))) == train(None)


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_rules_that_leave_too_little_to_move(name: str, spill_dir: Path) -> None:
    """What a rule keeps still leaves when memory runs out: the budget is harder than a wish."""
    network: Network = NETWORKS[name]
    budget = max(int(0.6 * plain_peak(network)), smallest_budget(network, spill_dir))
    rules = {"keep_ops": ("*",), "min_bytes": 0}
    watched = run_lms(network, budget, spill_dir, rules=rules)
    assert watched.outcome.differences(run_plain(network)) == []
    assert watched.peak_bytes <= budget
    assert watched.moved_bytes > 0


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("kind", "options"), [(torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9})])
def test_states_that_find_no_room_are_foretold(
    kind: Any, options: dict[str, float], foreach: bool, spill_dir: Path
) -> None:
    """The first step of an optimizer makes them. Who follows the errors is there after two of them."""

    def train(budget_bytes: int) -> torchlms.StepTorn | None:
        model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(12)))
        optimizer = kind(model.parameters(), lr=0.01, foreach=foreach, **options)
        with torchlms.LMS(model, optimizer, budget=budget_bytes, disk_dir=spill_dir, rules=SMALL):
            for _ in range(4):
                model(torch.randn(16, 128)).sum().backward()
                try:
                    optimizer.step()
                except torchlms.StepTorn as torn:
                    return torn
                optimizer.zero_grad()
        return None

    budget_bytes, refusals = 1_650_000, 0
    while (torn := train(budget_bytes)) is not None:
        assert "of them were still to be made: try" in str(torn)
        assert torn.smallest_bytes > budget_bytes
        budget_bytes, refusals = torn.smallest_bytes, refusals + 1
    assert 1 <= refusals <= 2


def test_a_refusal_inside_of_torchscript_is_not_lost(spill_dir: Path) -> None:
    """TorchScript makes a RuntimeError with no cause of whatever is raised in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        layers = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()))

    def forward(rows: int, shape: int = 64) -> None:
        with torchlms.LMS(layers, budget=150_000, disk_dir=spill_dir):
            layers(torch.ones(8, 64)).sum().backward()
            layers(torch.ones(rows, shape)).sum().backward()

    with pytest.raises(torchlms.BudgetTooSmall, match="of a budget of 146") as raised:
        forward(256)
    assert "TorchScript" in str(raised.value.__cause__)
    assert raised.value.smallest_bytes > 150_000
    with pytest.raises(RuntimeError, match="TorchScript") as other:
        forward(8, 63)
    assert not isinstance(other.value, torchlms.LMSError)
