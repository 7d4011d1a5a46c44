"""Coming from IBM LMS: every row of its tables names something that is there and does what it is said to do.

A row without an entry here fails, and so does an entry without a row. The entries are short: they show that
the heir has its effect; what it does in all its corners is tested where it lives.
"""

from __future__ import annotations

import ast
import functools
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tapes import GIB, MIB, Network, chain, cpu, gpu
from torch import nn
from typer.testing import CliRunner

import torchlms
from tests.docs.commands import can_be_read
from tests.runner.runs import forked_under_lms
from torchlms.cli import app
from torchlms.core.curve import baseline_curve, smallest_budget
from torchlms.core.plan import Budget, Choice, Plan
from torchlms.core.planner import plan
from torchlms.core.rules import Rules
from torchlms.core.tape import Tape
from torchlms.director import planned_line
from torchlms.loudness import LEVELS
from torchlms.report import plan_text
from torchlms.steps import ProfileWindow, StepLog

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "coming-from-lms.md"
AMPLE = 64 * GIB

Check = Callable[[str, Path], None]  # what stands in the row, and an empty folder
HEIRS: dict[str, Check] = {}


def rows() -> dict[str, str]:
    """What was there, and what is here."""
    lines = re.findall(r"^\| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    return {there: here for there, here in lines if there not in ("there", "---")}


def heir_of(*beginnings: str) -> Callable[[Check], Check]:
    """Of the rows that begin so."""

    def enter(check: Check) -> Check:
        HEIRS.update(dict.fromkeys(beginnings, check))
        return check

    return enter


def named(there: str) -> list[str]:
    return [beginning for beginning in HEIRS if there.startswith(beginning)]


def test_every_row_has_an_entry_and_every_entry_a_row() -> None:
    assert {there: named(there) for there in rows() if len(named(there)) != 1} == {}
    assert [key for key in HEIRS if not any(there.startswith(key) for there in rows())] == []


@pytest.mark.parametrize("there", rows())
def test_heir(there: str, tmp_path: Path) -> None:
    HEIRS[named(there)[0]](rows()[there], tmp_path)


# -- helpers ---------------------------------------------------------------------------------


@functools.cache
def layers() -> Tape:
    """Layers ``block0`` to ``block7``, made by ``aten.even`` and ``aten.odd`` in turn, of growing size."""
    network = Network()
    last = network.layer("data", 64 * MIB, 1e-3)
    for index in range(8):
        name = "aten.odd" if index % 2 else "aten.even"
        last = network.layer(name, (64 + index) * MIB, 2e-3, last, module=f"block{index}")
    return network.tape()


def budget(share: float) -> Budget:
    """``share`` of the way from the smallest budget of ``layers`` to no need for one."""
    least, most = smallest_budget(layers()), int(baseline_curve(layers()).max())
    return Budget(least + int(share * (most - least)), AMPLE, AMPLE)


def made(share: float, **rules: Any) -> Plan:
    return plan(layers(), gpu(), budget(share), Rules(min_bytes=0, **rules))


def movers(share: float = 2.0, **rules: Any) -> set[str]:
    """The modules whose values leave; under an ample budget only what a rule demands does."""
    return {layers().values[move.value].module for move in made(share, **rules).moves}


ALL = {"move_ops": ("*",)}


def distances(**rules: Any) -> list[int]:
    """How many ops before its need each copy back begins."""
    values = layers().values
    return [values[move.value].idle[move.stretch].stop - move.reload_op for move in made(0.9, **rules).moves]


def train(folder: Path, steps: int = 4, **options: Any) -> torchlms.LMS:
    """Steps of a small network in a budget that has values leave; the LMS is still on."""
    torch.manual_seed(0)
    net = nn.Sequential(*[each for _ in range(8) for each in (nn.Linear(64, 64), nn.Tanh())])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    options = {"budget": "1100KiB", "disk_dir": folder, "rules": {"min_bytes": 1024}} | options
    lms = torchlms.LMS(net, optimizer, **options).__enter__()
    for _ in range(steps):
        net(torch.ones(512, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return lms


def figures(folder: Path, **options: Any) -> dict[str, Any]:
    lms = train(folder, **options)
    try:
        return lms.stats()
    finally:
        torchlms.disable()


def invoke(*arguments: str) -> Any:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def read_commands(here: str) -> None:
    for command in re.findall(r"`torchlms ([a-z]+ -[^`]*)`", here):
        can_be_read(command.split())


def class_in(path: str, name: str) -> bool:
    tree = ast.parse((ROOT / "src" / "torchlms" / "integrations" / path).read_text())
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


@heir_of(
    "`optimizer_scopes`",
    "weights, gradients",
    "`serialization`",
    "`ctrld_strategy`",
    "`reclaim-algo`",
    "`batch_size`",
    "advice:",
    "DDL",
)
def nothing_to_name(here: str, folder: Path) -> None:
    del folder
    assert here.startswith(("not needed", "not yet", "nothing to set"))
    assert "`" not in here


# -- switching it on -------------------------------------------------------------------------


@heir_of("Caffe: `caffe train -lms`")
def run(here: str, folder: Path) -> None:
    read_commands(here)
    body = "import torch\nnet = torch.nn.Linear(4, 4)\nnet(torch.ones(2, 4)).sum().backward()\n"
    (folder / "train.py").write_text(body)
    ours = forked_under_lms("--budget=1GiB", "--json=-", "train.py", cwd=folder)
    assert json.loads(ours.out)["budget_bytes"] == GIB, ours.err


@heir_of("TensorFlow: `LMS(...).run(graph)`")
def around_a_loop(here: str, folder: Path) -> None:
    assert "torchlms.LMS(model, optimizer" in here
    assert figures(folder)["disk_bytes_per_step"] > 0


@heir_of("`LMSSessionRunHook`", "`LMSKerasCallback`")
def callbacks(here: str, folder: Path) -> None:
    """What they do is tested in tests/integrations, with the trainers' libraries."""
    del folder
    for module, name in re.findall(r"torchlms\.integrations\.(\w+)\.(\w+)", here):
        assert class_in(f"{module}.py", name)


@heir_of("`tf.config.experimental.set_lms_enabled", "it had to come before")
def on_and_off(here: str, folder: Path) -> None:
    del here
    for _ in range(2):
        torchlms.enable(budget="1GiB", disk_dir=folder, device="cpu")
        assert torchlms.stats()["state"] != "off"
        torchlms.disable()
        assert torchlms.stats() == {"state": "off"}


@heir_of("`--lms=True`")
def bench(here: str, folder: Path) -> None:
    read_commands(here)
    small = ["--model=mnist", "--batch-size=2", "--num-batches=1", "--warmup=1", "--device=cpu", "--json=-"]
    assert json.loads(invoke("bench", *small, f"--disk-dir={folder}").stdout)["lms"] is True
    assert json.loads(invoke("bench", *small, "--no-lms").stdout)["lms"] is False


@heir_of("is it on, is it working?")
def said(here: str, folder: Path) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torchlms")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        lms = train(folder, steps=6)
        state, report = lms.state, lms.report()
        torchlms.disable()
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
    assert "`lms.state`" in here
    assert state == "guard"
    assert "following a plan" in report
    assert lines[0].startswith("recording step 1")
    assert sum(line.startswith("planned in") for line in lines) == 1


@heir_of('"LMS is not necessary')
def aside(here: str, folder: Path) -> None:
    del folder
    assert '"everything fits: LMS stepped aside"' in here
    assert planned_line(layers(), made(2.0), aside=True).endswith("LMS stepped aside")


# -- what may be swapped ---------------------------------------------------------------------


@heir_of("`starting_scope`", "`incl_scopes`")
def only(here: str, folder: Path) -> None:
    del folder
    assert "`only_modules`, `only_ops`" in here
    assert movers(**ALL, only_modules=("block3",)) == {"block3"}
    assert movers(**ALL, only_ops=("aten.odd",)) <= {"block1", "block3", "block5", "block7"} & movers(**ALL)


@heir_of("`excl_scopes`")
def keep(here: str, folder: Path) -> None:
    del folder
    assert "`keep_modules`, `keep_ops`" in here
    assert movers(**ALL) - movers(**ALL, keep_modules=("block3",)) == {"block3"}
    assert "block2" in movers(**ALL)
    assert "block2" not in movers(**ALL, keep_ops=("aten.even",))


@heir_of("`excl_input_by_scopes`")
def keep_read(here: str, folder: Path) -> None:
    del folder
    assert "`keep_read_in`, `keep_read_by`" in here
    assert movers(**ALL) - movers(**ALL, keep_read_in=("block4",)) == {"block3"}
    assert movers(**ALL, keep_read_by=("*_backward",)) == set()


@heir_of("`incl_input_by_scopes`")
def only_read(here: str, folder: Path) -> None:
    del folder
    assert "`only_read_in`, `only_read_by`" in here
    assert movers(**ALL, only_read_in=("block4",)) == {"block3"}
    assert movers(**ALL, only_read_by=("nobody",)) == set()


@heir_of("`n_tensors`")
def most_values(here: str, folder: Path) -> None:
    del folder
    assert "rule `most_values`" in here
    assert movers(0.9) == {""}, "what waits longest"
    assert movers(0.9, most_values=2) <= {"block4", "block5"}, "the largest"
    with pytest.raises(torchlms.BudgetTooSmall):
        made(0.5, most_values=1)


@heir_of("`swapout_threshold`", "`swap_branches`")
def min_idle_ops(here: str, folder: Path) -> None:
    del folder
    assert "`min_idle_ops`" in here
    assert len(made(0.3).moves) > 1
    with pytest.raises(torchlms.BudgetTooSmall):
        made(0.3, min_idle_ops=13)  # the input alone is idle for so long


@heir_of("Caffe `-lms N`")
def min_bytes(here: str, folder: Path) -> None:
    assert "`min_bytes`" in here
    assert figures(folder, rules={"min_bytes": 1024})["plan"]["disk"]["values"] > 0
    values = layers().values
    large = plan(layers(), gpu(), budget(0.9), Rules(min_bytes=68 * MIB))
    assert min(values[move.value].size_bytes for move in large.moves) >= 68 * MIB


@heir_of("Caffe `-lms_exclude`", "`TF_LMS_SIMULATOR_MEM_RATIO`")
def headroom(here: str, folder: Path) -> None:
    del folder
    assert "rule `headroom_bytes`" in here
    spare = 64 * MIB
    assert made(0.8).predicted.peak_device_bytes > budget(0.8).device_bytes - spare
    planned = made(0.8, headroom_bytes=spare).predicted
    assert planned.peak_device_bytes <= budget(0.8).device_bytes - spare


@heir_of("Caffe `-lms_frac`")
def fraction(here: str, folder: Path) -> None:
    assert '`"90%"`' in here
    found = figures(folder, budget="90%")
    assert found["bytes_out_per_step"] == 0
    assert found["budget_bytes"] > GIB


@heir_of("PyTorch `set_limit_lms`")
def limit(here: str, folder: Path) -> None:
    assert "`lms.set_budget(...)`" in here
    lms = train(folder)
    try:
        lms.set_budget("1200KiB")
        assert lms.stats()["budget_bytes"] == 1200 << 10
    finally:
        torchlms.disable()


@heir_of('"largest GPU op')
def largest(here: str, folder: Path) -> None:
    del here, folder
    assert "largest single op aten." in planned_line(layers(), made(0.5), aside=False)
    with pytest.raises(torchlms.BudgetTooSmall, match=r"op \d+ \(aten\."):
        made(-0.1)


# -- when it goes and comes back -------------------------------------------------------------


@heir_of("`lb`")
def ahead(here: str, folder: Path) -> None:
    del folder
    assert "`reload_ahead_ops`" in here
    assert min(distances()) < 4 <= min(distances(reload_ahead_ops=4))


@heir_of("`ub`")
def within(here: str, folder: Path) -> None:
    del folder
    assert "`reload_within_ops`" in here
    early = max(distances(reload_ahead_ops=6))
    assert max(distances(reload_within_ops=2)) <= 2 < early


@heir_of("`fuse_swapins`")
def once(here: str, folder: Path) -> None:
    """Each layer's result has three readers in backward: one copy out, one copy back."""
    assert "brought back once" in here
    torch.manual_seed(0)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(8)]
    rules = {"min_bytes": 1024, "move_ops": ["aten.tanh*"]}
    with torchlms.LMS(budget="1GiB", disk_dir=folder, rules=rules, device="cpu") as lms:
        for _ in range(6):
            x = torch.ones(512, 64)
            for weight in weights:
                y = (x @ weight / 8).tanh()
                x = y * y.detach().cos() + y.sin() * y
            x.sum().backward()
        found, chosen = lms.stats(), lms.plan
    assert chosen is not None
    assert len({move.value for move in chosen.moves}) == len(chosen.moves) > 5
    moved = len(chosen.moves) * 512 * 64 * 4
    assert (found["bytes_out_per_step"], found["bytes_in_per_step"]) == (moved, moved)


@heir_of("`sync_mode`")
def copies(here: str, folder: Path) -> None:
    del folder
    for name in ("overlap", "wait out", "wait in", "wait"):
        assert f"`{name}`" in here
        assert Rules(copies=name).copies.value == name  # type: ignore[arg-type]
    free = made(0.5).predicted.step_s
    assert made(0.5, copies="wait in").predicted.step_s > free
    assert set(distances(copies="wait")) == {0}


@heir_of('"speculative page-out"')
def beside(here: str, folder: Path) -> None:
    del here, folder
    choices = {move.choice for move in made(0.8).moves}
    assert choices == {Choice.HOST}
    assert made(0.8).predicted.step_s < made(0.8, copies="wait").predicted.step_s


@heir_of("`torch.cuda.reclaim_inactive()`")
def reclaim(here: str, folder: Path) -> None:
    assert "`torchlms.reclaim()`" in here
    lms = train(folder)
    try:
        saved = torch.ones(512, 64, requires_grad=True).exp().exp().sum()
        assert lms.stats()["inactive_device_bytes"] > 0
        assert torchlms.reclaim() > 0
        assert lms.stats()["inactive_device_bytes"] == 0
        saved.backward()
    finally:
        torchlms.disable()


# -- auto-tuning -----------------------------------------------------------------------------


@heir_of("all three of v2's parameters")
def by_default(here: str, folder: Path) -> None:
    assert here.startswith("the default")
    assert figures(folder)["predicted"]["step_s"] > 0


@heir_of("`autotune_gpu_mem`")
def another_device(here: str, folder: Path) -> None:
    """A tape and a machine from elsewhere."""
    assert "`torchlms fit`" in here
    layers().save(folder / "tape.json")
    gpu().save(folder / "machine.json")
    files = [str(folder / "tape.json"), f"--machine={folder / 'machine.json'}"]
    size = [f"--budget={budget(0.5).device_bytes}", "--host-budget=64GiB", "--json=-"]
    assert json.loads(invoke("plan", *files, *size).stdout)["moves"]
    assert json.loads(invoke("fit", "--tape", *files, *size).stdout)["verdict"] == "moves"


@heir_of("`autotune_plot`")
def pictures(here: str, folder: Path) -> None:
    """The page itself is tested in tests/report_page."""
    del folder
    assert "`torchlms report`" in here
    invoke("report", "--help")
    assert "idle" in plan_text(layers(), made(0.5))


# -- host memory, devices --------------------------------------------------------------------


@heir_of("`TF_GPU_HOST_MEM_LIMIT_IN_MB`")
def host_budget(here: str, folder: Path) -> None:
    assert "`host_budget`" in here
    assert figures(folder, host_budget="3MiB")["host_budget_bytes"] == 3 << 20
    with pytest.raises(torchlms.HostBudgetTooSmall) as error:
        plan(layers(), gpu(), Budget(budget(0.2).device_bytes, MIB, 0), Rules())
    assert error.value.missing_bytes > 0


@heir_of("physical RAM")
def disk(here: str, folder: Path) -> None:
    assert "`disk_dir`, `disk_budget`" in here
    assert figures(folder, disk_budget="64MiB")["disk_bytes_per_step"] > 0
    roomy = plan(chain(), cpu(), Budget(smallest_budget(chain()), 0, AMPLE), Rules())
    assert {move.choice for move in roomy.moves} == {Choice.DISK}


@heir_of("`cpu_device`")
def device(here: str, folder: Path) -> None:
    assert "`device`" in here
    with torchlms.LMS(budget="1GiB", disk_dir=folder, device="cpu") as lms:
        assert lms._engine is not None
        assert str(lms._engine.device.torch_device) == "cpu"
        with pytest.raises(torchlms.NotSupported):
            torchlms.LMS(budget="1GiB", disk_dir=folder, device="cpu").__enter__()


# -- looking at it ---------------------------------------------------------------------------


@heir_of("`debug`")
def levels(here: str, folder: Path) -> None:
    """Each one's effect is tested in tests/test_loudness.py."""
    del folder
    assert [name for name in LEVELS if f"`{name}`" not in here and f"={name}`" not in here] == []


@heir_of("values leave only when")
def without_a_plan(here: str, folder: Path) -> None:
    assert "--no-plan" in here
    lms = train(folder, plan=False)
    found = lms.stats()
    lms.__exit__(None, None, None)
    assert lms.plan is None
    assert found["reclaims"] > 0


@heir_of("bytes reserved, the limit")
def the_limit(here: str, folder: Path) -> None:
    assert callable(torch.cuda.memory_reserved)
    lms = train(folder)
    found = lms.stats()
    lms.__exit__(None, None, None)
    assert found["budget_bytes"] == 1100 << 10
    assert "peak_reserved_bytes" in found


@heir_of("number of allocations")
def the_largest(here: str, folder: Path) -> None:
    lms = train(folder)
    lms.__exit__(None, None, None)
    assert lms.tape is not None
    assert max(value.size_bytes for value in lms.tape.values) > 0
    assert callable(torch.cuda.memory_stats)


@heir_of("bytes in use", "bytes reclaimed", "single reclaims", "distribution of allocations")
def counters(here: str, folder: Path) -> None:
    """Each name is a key; the first step, which has no plan, had to make room."""
    lms = train(folder, steps=1)
    try:
        found = lms.stats()
        saved = torch.ones(512, 64, requires_grad=True).exp().sum()
        before = found["single_reclaims"], found["full_reclaims"]
        lms.reclaim()
        after = lms.stats()["single_reclaims"], lms.stats()["full_reclaims"]
        saved.backward()
    finally:
        torchlms.disable()
    names = re.findall(r"`(\w+)`", here)
    assert names
    assert [name for name in names if name not in found] == []
    assert found["reclaims"] >= found["single_reclaims"] > 0
    assert found["reclaimed_bytes"] > 0
    assert found["peak_device_bytes"] >= found["active_device_bytes"] > 0
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1), "one value was all there was"


@heir_of("`LMSStatsLogger`", "`LMSStatsAverage`", "TensorBoard")
def step_log(here: str, folder: Path) -> None:
    """Also as options of run: tests/runner."""
    read_commands(here)
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            scalars.append((tag, scalar_value, global_step))

    lms = train(folder, steps=1)
    try:
        with StepLog(lms, folder / "steps.csv", writer=Writer(), skip=1, batch_size=32) as log:
            log.step(phase="train")
            log.step(phase="validate")
    finally:
        torchlms.disable()
    assert "StepLog(" in here
    assert (folder / "steps.csv").read_text().splitlines()[2].endswith(",validate")
    assert log.averages()["steps"] == 1
    assert ("torchlms/reclaims", 0, 1) in scalars


@heir_of("`CudaProfileCallback`")
def window(here: str, folder: Path) -> None:
    assert "ProfileWindow(" in here
    read_commands(here)
    with ProfileWindow(folder / "trace.json", first=1, last=1) as steps:
        steps.step()
        torch.ones(2).cosh()
        steps.step()
    assert "aten::cosh" in (folder / "trace.json").read_text()
