"""The public verbs: entering, leaving, nesting, options that cannot be, and plans from files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import torchlms
import torchlms.api
from torchlms.core.machine import Machine
from torchlms.core.plan import Decision, Plan
from torchlms.eager.private import top_dispatch_mode, top_saved_tensor_hooks

BUDGET = 500_000
RULES = {"min_bytes": 1024}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same rates everywhere, without measuring them; and one test's failure is not the next one's."""
    made = Machine("cpu", 16 << 30, torch.__version__, disk_write_bytes_per_s=1e9, disk_read_bytes_per_s=1e9)
    monkeypatch.setattr(torchlms.api, "measured_machine", lambda *_, **__: made)
    yield
    with contextlib.suppress(torchlms.LMSError):
        torchlms.disable()


def make_model(width: int = 32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(width, width), nn.Tanh())])


def train(model: nn.Module, steps: int = 5, batch_size: int = 512, width: int = 32) -> list[str]:
    """The losses, as exact text. Needs some 700 KB for the default batch."""
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(batch_size, width, generator=generator)).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        model.zero_grad()
        losses.append(loss.item().hex())
    return losses


PLAIN = train(make_model())


def open_lms(model: nn.Module | None, spill_dir: Path, **options: Any) -> torchlms.LMS:
    return torchlms.LMS(model, **({"budget": BUDGET, "disk_dir": spill_dir, "rules": RULES} | options))


def assert_off() -> None:
    assert top_dispatch_mode() is None
    assert top_saved_tensor_hooks() is None


# -- on and off ------------------------------------------------------------------------------


def test_one_line(spill_dir: Path) -> None:
    model = make_model()
    with open_lms(model, spill_dir) as lms:
        assert lms.state == "record"
        assert train(model) == PLAIN
        assert lms.state == "guard"
        assert lms.stats()["bytes_out_per_step"] > 0
        assert lms.stats()["peak_device_bytes"] <= BUDGET
    assert lms.state == "off"
    assert_off()
    assert list(spill_dir.iterdir()) == []


@pytest.mark.parametrize("named", [True, False])
def test_the_whole_program(named: bool, spill_dir: Path) -> None:
    """``enable`` also works for a program whose model is nobody's business yet."""
    model = make_model()
    lms = torchlms.enable(
        model if named else None, budget=BUDGET, disk_dir=spill_dir, device="cpu", rules=RULES
    )
    try:
        assert train(model) == PLAIN
        assert lms.stats()["bytes_out_per_step"] > 0
    finally:
        torchlms.disable()
    assert_off()
    assert lms.state == "off"
    torchlms.disable()  # once more does nothing
    assert train(make_model()) == PLAIN


def test_making_one_changes_nothing(spill_dir: Path) -> None:
    lms = open_lms(make_model(), spill_dir)
    assert_off()
    assert lms.state == "off"
    assert lms.stats() == {"state": "off", "steps": 0}
    assert lms.report() == "LMS is not on; 0 steps"
    assert (lms.plan, lms.tape, lms.machine) == (None, None, None)


def test_twice_at_once(spill_dir: Path) -> None:
    model = make_model()
    with open_lms(model, spill_dir) as first:
        losses = train(model, 2)
        for enter in (open_lms(model, spill_dir).__enter__, lambda: torchlms.enable(model, budget=BUDGET)):
            with pytest.raises(torchlms.NotSupported, match="on already"):
                enter()
        with pytest.raises(torchlms.NotSupported, match="on already"):
            first.__enter__()
        assert losses == PLAIN[:2]
        assert first.state == "guard"
    assert_off()


def test_twice_one_after_the_other(spill_dir: Path) -> None:
    model = make_model()
    with open_lms(model, spill_dir) as used:
        train(model, 2)
    with pytest.raises(torchlms.NotSupported, match="used before"):
        used.__enter__()
    assert_off()
    model = make_model()
    with open_lms(model, spill_dir) as lms:
        assert train(model) == PLAIN
        assert lms.stats()["bytes_out_per_step"] > 0


def test_disable_inside_a_block(spill_dir: Path) -> None:
    with open_lms(make_model(), spill_dir):
        torchlms.disable()
        assert_off()
    assert_off()


def test_leaving_twice_does_nothing(spill_dir: Path) -> None:
    with open_lms(make_model(), spill_dir) as first:
        pass
    with open_lms(make_model(), spill_dir) as second:
        first.__exit__(None, None, None)
        assert second.state == "record"
        assert top_dispatch_mode() is not None
    assert_off()


def test_each_thread_has_its_own(spill_dir: Path) -> None:
    inside, both = threading.Event(), threading.Barrier(2, timeout=60)
    found: dict[str, Any] = {}

    models = make_model(), make_model()  # here, for the default generator is everybody's

    def other() -> None:
        model = models[1]
        inside.wait(60)
        assert top_dispatch_mode() is None
        with open_lms(model, spill_dir) as lms:
            both.wait()
            found["losses"] = train(model)
            found["moved"] = lms.stats()["bytes_out_per_step"]

    worker = threading.Thread(target=other)
    worker.start()
    model = models[0]
    with open_lms(model, spill_dir) as lms:
        inside.set()
        both.wait()
        losses = train(model)
        assert lms.stats()["bytes_out_per_step"] > 0
        worker.join(60)
    assert losses == found["losses"] == PLAIN
    assert found["moved"] > 0


# -- contexts closed in another order than opened --------------------------------------------


class Passing(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def their_hooks() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda item: item, lambda item: item)


@pytest.mark.parametrize("make_other", [Passing, their_hooks])
def test_closed_under_somebody_elses_context(make_other: Callable[[], Any], spill_dir: Path) -> None:
    """One clear error; theirs stays in place and ours does nothing more."""
    model, other = make_model(), make_other()
    lms = open_lms(None, spill_dir, device="cpu", budget="1GiB")
    lms.__enter__()
    other.__enter__()
    kept = model(torch.randn(512, 32)).sum()
    with pytest.raises(torchlms.NotSupported, match="opposite order"):
        lms.__exit__(None, None, None)
    assert lms.state == "off"
    assert list(spill_dir.iterdir()) == []
    if make_other is Passing:
        assert top_dispatch_mode() is other, "somebody else's mode was popped"
    else:
        assert top_saved_tensor_hooks() is not None
    kept.backward()
    assert train(make_model()) == PLAIN
    other.__exit__(None, None, None)
    assert train(make_model()) == PLAIN
    assert lms._installation is not None
    lms._installation.take_off()  # what nobody can do who has no business here
    assert_off()


def test_closed_inside_of_inference_mode(spill_dir: Path) -> None:
    """At its end inference mode brings back the dispatch keys of before; torch must still find our mode."""
    lms = open_lms(None, spill_dir, device="cpu", budget="1GiB")
    lms.__enter__()
    assert train(make_model()) == PLAIN
    with torch.inference_mode():
        with pytest.raises(torchlms.NotSupported, match="an inference mode"):
            lms.__exit__(None, None, None)
        assert torch.empty(3).numel() == 3
    assert lms.state == "off"
    assert list(spill_dir.iterdir()) == []
    assert train(make_model()) == PLAIN
    assert lms._installation is not None
    lms._installation.take_off()  # what nobody can do who has no business here
    assert_off()


def test_a_model_that_does_not_know_its_sizes_yet(spill_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.LazyBatchNorm1d(), torch.nn.ReLU())
    with open_lms(model, spill_dir, budget="1GiB"):
        for _ in range(3):
            model(torch.randn(16, 4)).sum().backward()
    assert_off()


@pytest.mark.parametrize("budget", [np.int64(1 << 30), np.float32(1 << 30), 1e9])
def test_numbers_of_any_kind_are_sizes(budget: Any, spill_dir: Path) -> None:
    with open_lms(make_model(), spill_dir, budget=budget, device="cpu:0") as lms:
        assert lms.stats()["budget_bytes"] == int(budget)


@pytest.mark.parametrize("budget", [np.float32("nan"), np.float64("inf"), np.int64(-1), np.bool_(True)])
def test_numbers_of_any_kind_that_are_no_sizes(budget: Any, spill_dir: Path) -> None:
    with pytest.raises(torchlms.BadOption, match="budget"):
        open_lms(make_model(), spill_dir, budget=budget)


@pytest.mark.parametrize("plan", [False, None])
def test_the_report_after_the_end_says_what_moved(plan: bool | None, spill_dir: Path) -> None:
    """However soon the end came: also where what ran last was a step in which something was tried."""
    model = torch.nn.Sequential(
        *(layer for _ in range(8) for layer in (torch.nn.Linear(64, 64), torch.nn.Tanh()))
    )
    for steps in (1, 3, 5, 6, 7):
        with open_lms(model, spill_dir, budget="1500KiB", plan=plan, rules={"min_bytes": 4096}) as lms:
            for _ in range(steps):
                model(torch.randn(1024, 64)).square().mean().backward()
                model.zero_grad()
        stats, said = lms.stats(), lms.report()
        assert stats["bytes_out_per_step"] > 0 or stats["replayed_ops"] > 0
        assert stats["peak_device_bytes"] > 1 << 20
        assert ("no plan: peak allocated 1." in said) is (not lms.plan)
        assert "times memory had run out" in said


def test_closed_from_another_thread(spill_dir: Path) -> None:
    failures: list[BaseException] = []

    def leave() -> None:
        try:
            lms.__exit__(None, None, None)
        except torchlms.NotSupported as error:
            failures.append(error)

    lms = open_lms(make_model(), spill_dir)
    lms.__enter__()
    worker = threading.Thread(target=leave)
    worker.start()
    worker.join()
    assert len(failures) == 1
    assert "another thread" in str(failures[0])
    assert lms.state == "off"
    assert train(make_model()) == PLAIN
    torchlms.disable()
    assert lms._installation is not None
    lms._installation.take_off()
    assert_off()


def test_opening_that_fails_half_way(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise KeyboardInterrupt("on purpose")

    model = make_model()
    with monkeypatch.context() as patched:
        patched.setattr(torchlms.api.Installation, "put_on", fail)
        with pytest.raises(KeyboardInterrupt):
            open_lms(model, spill_dir).__enter__()
    assert_off()
    assert not model._forward_pre_hooks
    assert not any(vars(parameter.untyped_storage()) for parameter in model.parameters())
    with open_lms(model, spill_dir):
        assert train(model) == PLAIN


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["budget", "host_budget", "disk_budget"])
@pytest.mark.parametrize("size", ["", "lots", "16G", "-1", -5, "150%", float("nan"), True, [1], 0.5])
def test_sizes_that_cannot_be_read(name: str, size: Any) -> None:
    with pytest.raises(torchlms.BadOption) as raised:
        torchlms.LMS(make_model(), **{name: size})
    assert repr(size).strip("'") in str(raised.value)
    assert str(raised.value).startswith(name)
    assert_off()


@pytest.mark.parametrize("size", ["0", 0])
def test_a_budget_of_nothing(size: Any) -> None:
    with pytest.raises(torchlms.BadOption, match="more than zero"):
        torchlms.LMS(make_model(), budget=size)
    torchlms.LMS(make_model(), host_budget=size, disk_budget=size)


def test_no_disk_at_all(spill_dir: Path) -> None:
    """What must move has nowhere to go, and the error names the option; what fits runs."""
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Tanh())))
    inputs = torch.randn(256, 64)
    with torchlms.LMS(model, budget="64MiB", disk_budget=0, disk_dir=spill_dir):
        model(inputs).sum().backward()
    assert list(spill_dir.iterdir()) == []
    refused = pytest.raises(torchlms.LMSError, match="disk_budget")
    with refused, torchlms.LMS(model, budget="640KiB", disk_budget="0", disk_dir=spill_dir):
        model(inputs).sum().backward()


@pytest.mark.parametrize("budget", ["1000 TiB", 1 << 60])
def test_more_than_the_machine_has(budget: str | int, spill_dir: Path) -> None:
    with pytest.raises(torchlms.BadOption, match="more than cpu has"):
        open_lms(make_model(), spill_dir, budget=budget).__enter__()
    assert_off()


@pytest.mark.parametrize(
    ("budget", "host_budget"), [(None, None), ("50%", "10%"), ("1 GiB", 10**6), (1e9, 1.5e6)]
)
def test_sizes_that_can_be_read(budget: Any, host_budget: Any, spill_dir: Path) -> None:
    with open_lms(make_model(), spill_dir, budget=budget, host_budget=host_budget, disk_budget="1GB") as lms:
        assert lms.stats()["budget_bytes"] > 10**8


@pytest.mark.parametrize("size", ["1e400", 10**400, "9e18 KB"], ids=["1e400", "10**400", "9e18 KB"])
@pytest.mark.parametrize("name", ["budget", "host_budget", "disk_budget"])
def test_more_than_any_memory_has(name: str, size: str | int, spill_dir: Path) -> None:
    with pytest.raises(torchlms.BadOption, match="no memory has as many bytes"):
        open_lms(make_model(), spill_dir, **{name: size})


@pytest.mark.parametrize("disk_dir", ["", "/tmp/\0x", "/proc/spill"])
def test_a_directory_that_cannot_be(disk_dir: str) -> None:
    with pytest.raises(torchlms.BadOption, match="disk_dir"):
        torchlms.LMS(make_model(), budget=BUDGET, disk_dir=disk_dir)


@pytest.mark.parametrize("name", ["host_budget", "disk_budget"])
def test_more_than_is_free_is_said_and_not_counted_on(
    name: str, spill_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "torchlms"):
        lms = open_lms(make_model(), spill_dir, **{name: "900 TiB"})
        with lms:
            store = lms._engine.store  # type: ignore[union-attr]
            assert getattr(store, f"{name}_bytes") < 900 << 40
    assert f"{name}: 900.0 TiB were asked for" in caplog.text


def test_a_model_on_two_devices() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(torchlms.NotSupported, match="cpu, meta"):
        torchlms.LMS(model, budget=BUDGET)


@pytest.mark.parametrize(
    ("model", "device", "error"),
    [
        (nn.Linear(2, 2, device="meta"), None, torchlms.NotSupported),
        (None, "meta", torchlms.NotSupported),
        (None, "xpu:0", torchlms.NotSupported),
        (None, "banana", torchlms.BadOption),
        (None, object(), torchlms.BadOption),
        (nn.Linear(2, 2), "meta", torchlms.BadOption),
    ],
)
def test_devices_that_cannot_be(model: nn.Module | None, device: Any, error: type, spill_dir: Path) -> None:
    with pytest.raises(error):
        open_lms(model, spill_dir, device=device)


@pytest.mark.parametrize(
    ("arguments", "rules"),
    [
        (("16GiB",), None),
        ((nn.Linear(2, 2), [torch.optim.SGD(nn.Linear(2, 2).parameters())]), None),
        ((), {"keep_module": ["x"]}),
        ((), {"min_bytes": "1M"}),  # binary or decimal?
        ((), {"keep_ops": {"relu"}}),
    ],
)
def test_other_bad_options(arguments: tuple[Any, ...], rules: Any) -> None:
    with pytest.raises(torchlms.BadOption):
        torchlms.LMS(*arguments, rules=rules)


def test_rules_by_module_op_and_size(spill_dir: Path) -> None:
    def moved(rules: Any) -> set[tuple[str, str]]:
        model = make_model()
        with open_lms(model, spill_dir, budget="1MiB", rules=rules) as lms:
            assert train(model) == PLAIN
            assert lms.plan is not None
            assert lms.tape is not None
            values = [lms.tape.values[decision.value] for decision in lms.plan.moves]
            return {(value.module, value.op) for value in values}

    assert moved({"min_bytes": 0}) == set()
    assert {module for module, _ in moved({"move_modules": ("3", "7")})} == {"3", "7"}
    assert {op for _, op in moved(torchlms.Rules(move_ops=("aten.tanh*",)))} == {"aten.tanh.default"}
    assert "3" not in {module for module, _ in moved({"move_ops": ("aten.tanh*",), "keep_modules": ("3",)})}


# -- plans -----------------------------------------------------------------------------------


@pytest.fixture
def plan(spill_dir: Path) -> Plan:
    model = make_model()
    with open_lms(model, spill_dir) as lms:
        train(model)
        assert lms.plan is not None
        return lms.plan


def test_a_plan_from_a_file(plan: Plan, spill_dir: Path, tmp_path: Path) -> None:
    """Followed after one recorded step, as it is."""
    plan.save(tmp_path / "plan.json")
    for given in (tmp_path / "plan.json", str(tmp_path / "plan.json"), plan):
        model = make_model()
        with open_lms(model, spill_dir, plan=given) as lms:
            assert train(model) == PLAIN
            assert lms.plan == plan
            assert lms.stats()["bytes_out_per_step"] == plan.predicted.bytes_out > 0
            assert lms.stats()["peak_device_bytes"] <= BUDGET
            assert lms.stats()["record_steps"] == 1


def changed(text: str, **fields: Any) -> str:
    return json.dumps(json.loads(text) | fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: changed(text, torch="1.4.0"), "torch 1.4.0"),
        (lambda text: changed(text, schema="torchlms.plan/999"), "schema 'torchlms.plan/999'"),
        (lambda text: changed(text, schema="torchlms.tape/1"), "it holds a torchlms.tape/1"),
        (lambda text: changed(text, surprise=1), "surprise"),
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[]", "it holds no record of torchlms"),
        (lambda text: None, "cannot read"),
    ],
    ids=["torch", "schema", "tape", "field", "half", "list", "missing"],
)
def test_a_plan_file_that_does_not_belong_here(
    change: Callable[[str], str | None], words: str, plan: Plan, spill_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    text = change(path.read_text())
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(torchlms.PlanMismatch, match=words):
        open_lms(make_model(), spill_dir, plan=path)


def test_a_plan_for_a_larger_budget(plan: Plan, spill_dir: Path) -> None:
    with pytest.raises(torchlms.PlanMismatch, match="more than the budget"):
        open_lms(make_model(), spill_dir, plan=plan, budget=BUDGET - 1).__enter__()
    assert_off()
    model = make_model()
    with open_lms(model, spill_dir, plan=plan, budget=2 * BUDGET) as lms:
        assert train(model) == PLAIN
        assert lms.stats()["peak_device_bytes"] <= BUDGET


def test_a_plan_of_another_model(plan: Plan, spill_dir: Path) -> None:
    """Known when the first step has been recorded, before any is run by it."""
    torch.manual_seed(2)
    model = nn.Sequential(*[layer for _ in range(9) for layer in (nn.Linear(32, 32), nn.Sigmoid())])
    with (
        pytest.raises(torchlms.PlanMismatch, match="another model, batch or shape"),
        open_lms(model, spill_dir, plan=plan),
    ):
        train(model)
    assert_off()


def changed_moves(plan: Plan, change: Callable[[Decision], Decision]) -> Plan:
    """The plan, with something else in each decision that moves a value."""
    moves = set(plan.moves)
    decisions = [change(decision) if decision in moves else decision for decision in plan.decisions]
    return dataclasses.replace(plan, decisions=tuple(decisions))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: dataclasses.replace(one, value=99_999), "no such value"),
        (lambda one: dataclasses.replace(one, stretch=17), "no such idle stretch"),
        (lambda one: dataclasses.replace(one, release_op=-5), "released before the stretch begins"),
        (lambda one: dataclasses.replace(one, release_op=1_000_000), "release 1000000"),
        (
            lambda one: dataclasses.replace(one, release_op=one.reload_op, reload_op=one.release_op),
            "released at or after its reload",
        ),
        (lambda one: dataclasses.replace(one, reload_op=1_000_000), "reloaded after it is needed"),
        (lambda one: dataclasses.replace(one, offset_bytes=7), "offset not aligned"),
        (lambda one: dataclasses.replace(one, offset_bytes=0), "shares bytes with another value"),
    ],
)
def test_a_plan_that_was_changed(
    change: Callable[[Decision], Decision], words: str, plan: Plan, spill_dir: Path
) -> None:
    """Same computation by its name, decisions from elsewhere: said before any step is run by it."""
    model = make_model()
    with (
        pytest.raises(torchlms.PlanMismatch, match=f"cannot be carried out in this step: .*{words}"),
        open_lms(model, spill_dir, plan=changed_moves(plan, change)),
    ):
        train(model)
    assert_off()


def test_a_plan_that_asks_for_more_than_there_is(plan: Plan, spill_dir: Path) -> None:
    """Known before anything runs, and by how much."""
    spill_bytes = plan.predicted.spill_bytes
    with pytest.raises(torchlms.HostBudgetTooSmall, match="the plan given") as refused:
        open_lms(make_model(), spill_dir, plan=plan, disk_budget=spill_bytes - 8192).__enter__()
    assert refused.value.missing_bytes == 8192
    assert_off()
    model = make_model()
    with open_lms(model, spill_dir, plan=plan, disk_budget=spill_bytes + (1 << 20)):
        assert train(model) == PLAIN


def test_a_given_plan_and_a_small_last_batch(plan: Plan, spill_dir: Path) -> None:
    model = make_model()
    with open_lms(model, spill_dir, plan=plan):
        for _ in range(3):
            train(model, 2)
            train(model, 1, batch_size=100)


# -- around it -------------------------------------------------------------------------------


MEASURE = torchlms.api.measured_machine


def test_measuring_the_machine_draws_no_random_numbers(spill_dir: Path) -> None:
    """It happens when LMS is entered for the first time, between the user's seed and the first step."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = MEASURE(torch.device("cpu"), spill_dir, refresh=True)
    assert found.disk_write_bytes_per_s > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert not _get_current_dispatch_mode_stack()


@pytest.mark.parametrize("snapshot", ["yes", 1, None])
def test_snapshot_is_true_or_false(snapshot: Any) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(torchlms.BadOption, match=r"snapshot=.*True or False"):
        torchlms.LMS(model, torch.optim.SGD(model.parameters(), 0.1), budget=BUDGET, snapshot=snapshot)


def test_a_directory_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(torchlms.BadOption, match="is not a directory"):
        torchlms.LMS(torch.nn.Linear(2, 2), budget=BUDGET, disk_dir=occupied / "deeper")


def test_a_rule_that_matches_nothing_is_said(spill_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    rules = {"keep_modules": ["no.such.layer"], "keep_ops": ["aten.relu*"]}
    caplog.set_level("WARNING", logger="torchlms")
    with torchlms.LMS(model, budget="1GiB", disk_dir=spill_dir, rules=rules):
        for _ in range(5):
            model(torch.randn(8, 64)).sum().backward()
    said = [record.getMessage() for record in caplog.records]
    assert sum("keep_modules 'no.such.layer'" in line for line in said) == 1
    assert not any("aten.relu" in line for line in said)


@pytest.mark.parametrize(
    ("rules", "recompute", "asked"),
    [
        (None, None, True),
        (None, False, False),
        ({"recompute": False}, None, False),
        ({"recompute": False}, True, True),
        ({"recompute": True}, False, False),
    ],
)
def test_recompute_by_name_or_by_rule(rules: Any, recompute: bool | None, asked: bool) -> None:
    lms = torchlms.LMS(device="cpu", rules=rules, recompute=recompute)
    assert lms._options.rules.recompute is asked


def test_the_loops_own_error_is_the_one_to_be_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def left_badly(error: Exception | None) -> None:
        def fail() -> None:
            raise torchlms.SpillError("while it was left")

        with torchlms.LMS(torch.nn.Linear(4, 4), budget="1GiB", disk_dir=tmp_path) as lms:
            lms._undo.callback(fail)
            if error is not None:
                raise error

    with pytest.raises(torchlms.SpillError, match="while it was left"):
        left_badly(None)
    assert "while it was left" not in caplog.text
    with pytest.raises(KeyError, match="of the loop"):
        left_badly(KeyError("of the loop"))
    assert "while it was left" in caplog.text
