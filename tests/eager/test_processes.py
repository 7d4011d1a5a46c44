"""Forks and worker processes pass LMS by; the parent goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eviction import evict, leaves, open_wide
from sessions import (
    Session,
    bits,
    moved_bytes,
    new_session,
    open_lms,
    outcome,
    plain_peak,
    plain_step,
    run_plain,
)
from small_networks import NETWORKS

from tests import forked
from torchlms.eager import private

MLP = NETWORKS["mlp"]
BUDGET = 800_000  # of 1.7 MB
WAIT_S = 60

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_child(work: Callable[[], object]) -> str:
    """What ``work`` returns in a forked child, as text; the child ends at once and without clean-up."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(WAIT_S)
        text = "died"
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, text.encode()[:4000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def test_a_forked_child_has_neither_mode_nor_hooks(spill_dir: Path) -> None:
    def found() -> tuple[Any, Any]:
        return private.top_dispatch_mode(), private.top_saved_tensor_hooks()

    with open_lms(new_session(MLP), BUDGET, spill_dir) as lms:
        assert in_child(found) == "(None, None)"
        assert all(found()), "and the parent still has"
        assert in_child(lambda: lms.__exit__(None, None, None)) == "None", "the child leaves as it likes"
    assert in_child(found) == "(None, None)"


def test_a_forked_child_trains_on_its_own(spill_dir: Path) -> None:
    plain = run_plain(MLP)
    session = new_session(MLP)
    with open_lms(session, BUDGET, spill_dir) as lms:
        for step in range(6):
            plain_step(session, step)
            if step in (0, 4):
                alone = Session(session.model, session.optimizer, MLP)
                told = in_child(lambda alone=alone, step=step: train_one(alone, step + 1, lms))  # type: ignore[misc]
                assert told.startswith("0 bytes moved, loss 0x1.")
                told_loss = told.split()[-1]
        assert lms.stats()["bytes_out_per_step"] > 0
    assert outcome(session).differences(plain) == []
    assert told_loss == plain.losses[5], "the child's own step is right, too"


def train_one(session: Session, step: int, lms: Any) -> str:
    before = moved_bytes(lms)
    plain_step(session, step)
    return f"{moved_bytes(lms) - before} bytes moved, loss {session.losses[-1]}"


def test_a_child_uses_what_is_here_and_is_told_what_is_not(spill_dir: Path) -> None:
    """A graph of the parent: its kept values are copied with the process, those on disk are the parent's."""
    with open_wide(spill_dir) as lms:
        x, w = leaves()
        loss = torch.tanh(x @ w).exp().sum()

        def backward() -> str:
            loss.backward(retain_graph=True)
            assert w.grad is not None
            return bits(w.grad)

        here = in_child(backward)
        assert evict(lms) > 0
        away = in_child(backward)
        assert backward() == here
        assert "SpillError" in away
    assert list(spill_dir.iterdir()) == []


def test_a_child_that_ends_normally_removes_nothing(spill_dir: Path) -> None:
    """Its interpreter runs finalizers; the file and the hooks are the parent's."""
    with open_wide(spill_dir) as lms:
        x, w = leaves()
        loss = torch.tanh(x @ w).exp().sum()
        assert evict(lms) > 0
        child = os.fork()
        if child == 0:
            signal.alarm(WAIT_S)
            try:
                del loss, x, w
                lms.__exit__(None, None, None)
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert len(list(spill_dir.iterdir())) == 1
        loss.backward()
        assert w.grad is not None


PROGRAM = """
    import os, sys, torch, torchlms
    import torchlms.api
    from torchlms.core.machine import Machine

    torch.set_num_threads(1)
    rates = dict(disk_write_bytes_per_s=1e9, disk_read_bytes_per_s=1e9)
    torchlms.api.measured_machine = lambda *_, **__: Machine("cpu", 1 << 34, torch.__version__, **rates)
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(64, 64), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers)
    lms = torchlms.enable(model, budget=1_000_000, disk_dir=sys.argv[1], rules={"min_bytes": 1024})
    for _ in range(6):
        loss = model(torch.randn(512, 64)).sum()
        loss.backward()
        model.zero_grad()
    kept = model(torch.randn(512, 64)).sum()  # a graph with values on disk when the program ends
    assert lms.stats()["bytes_out_per_step"] > 0
    print("moved")
    END
"""


@pytest.mark.parametrize("end", ["raise ValueError('on purpose')", "os.kill(os.getpid(), 9)"])
def test_a_program_that_never_disables(end: str, tmp_path: Path) -> None:
    """The interpreter ends, in whatever way, and nothing is left; after kill -9, at the next start."""
    code = textwrap.dedent(PROGRAM).replace("END", end)
    spill = tmp_path / "other"
    ended = forked.run("-c", code, str(spill), cwd=tmp_path)
    assert ended.out.strip() == "moved", ended.err
    left = list(spill.iterdir())
    if "kill" in end:
        assert ended.status == -9
        assert len(left) == 1
        session = new_session(MLP)
        with open_lms(session, BUDGET, spill):
            plain_step(session, 0)
            assert left[0] not in list(spill.iterdir())
    else:
        assert ended.status == 1
    assert list(spill.iterdir()) == []
    noise = [line for line in ended.err.splitlines() if "Exception ignored" in line or "Error" in line]
    assert noise == (["ValueError: on purpose"] if "raise" in end else [])


def test_the_budget_here_is_a_real_one() -> None:
    assert plain_peak(MLP) > 1.5 * BUDGET
