"""Trial: a run under LMS with one fault in it. Whatever happens, it ends as the plain run does.

After an error the step is given up, as a program would that goes on from its last checkpoint: gradients
are dropped, buffers and generator put back, parameters and states only if the error says they are torn.
"""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from faults.injection import HARMLESS, KINDS, PERSISTS, DeviceFails, Fault, Strikes, Users
from sessions import Outcome, Session, new_session, outcome, plain_peak, plain_step, run_plain
from small_networks import NETWORKS, Network, Perceptron

import torchlms
from torchlms import api
from torchlms.core.machine import Machine
from torchlms.eager import private

STEPS = 6  # recorded, timed twice, planned
MOST_TRIES = 60  # of one step: a fault that lasts is over by then
GRACE_S = 2.0  # for a thread that has been told to end


def _foreach(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)


NETWORK = replace(
    NETWORKS["mlp"],
    name="faults",
    make_model=partial(Perceptron, layers=4),
    make_optimizer=_foreach,
    batch_size=128,
)


@dataclass(frozen=True)
class Found:
    """What came of a fault: the errors it led to, and what was wrong afterwards (nothing, one hopes)."""

    fault: Fault
    snapshot: bool
    recompute: bool
    errors: tuple[str, ...]
    wrong: tuple[str, ...]


def try_fault(
    fault: Fault,
    spill_dir: Path,
    *,
    snapshot: bool,
    recompute: bool,
    network: Network = NETWORK,
    steps: int = STEPS,
) -> Found:
    threads = set(threading.enumerate())
    budget, plain = budget_bytes(network, steps), expected(network, steps)
    session = new_session(network)
    rules = {"min_bytes": 512, "recompute": recompute}
    errors: list[str] = []
    wrong: list[str] = []
    with _known_machine(slow=recompute):
        lms = torchlms.LMS(
            session.model,
            session.optimizer,
            budget=budget,
            disk_dir=spill_dir,
            rules=rules,
            snapshot=snapshot,
        )
        with lms, fault.injected():
            for step in range(steps):
                _step_until_done(session, step, errors, wrong)
    wrong += outcome(session).differences(plain)
    if errors and fault.kind in HARMLESS:
        wrong.append(f"it was raised to the user: {errors}")
    wrong += _left_behind(lms, spill_dir, threads)
    return Found(fault, snapshot, recompute, tuple(errors), tuple(wrong))


def _step_until_done(session: Session, step: int, errors: list[str], wrong: list[str]) -> None:
    for _ in range(MOST_TRIES):
        with private.unwatched():  # the harness is no part of the program
            before = _State(session)
        try:
            plain_step(session, step)
            before.forget()
            return
        except (torchlms.LMSError, Users, DeviceFails, KeyboardInterrupt) as error:
            errors.append(type(error).__name__)
            torn = isinstance(error, torchlms.StepTorn) and not error.restored
            # In the middle of an update an exception that is not ours is as bad as in plain PyTorch; after
            # one the step was done.
            torn = torn or isinstance(error, KeyboardInterrupt) or before.updated
            torn = torn or (isinstance(error, Users) and before.updating)
        except Exception as error:
            wrong.append(f"step {step} raised {type(error).__name__}: {error}")
            torn = True
        with private.unwatched():
            if not torn and before.parameters_differ():
                wrong.append(f"step {step} changed parameters or states and did not say so: {errors[-1:]}")
            before.put_back(torn=torn)
    wrong.append(f"step {step} could not be done in {MOST_TRIES} tries: {errors[-1:]}")


class _State:
    """What a program that can go on after an error keeps of the moment before a step."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.model = copy.deepcopy(session.model.state_dict())
        self.optimizer = copy.deepcopy(session.optimizer.state_dict())
        self.generator = torch.get_rng_state()
        self.bits = _lasting(outcome(session))
        self.updating = self.updated = False
        self._hooks = (
            session.optimizer.register_step_pre_hook(self._note_begin),
            session.optimizer.register_step_post_hook(self._note_end),
        )

    def _note_begin(self, *_: Any) -> None:
        self.updating = True

    def _note_end(self, *_: Any) -> None:
        self.updated = True

    def parameters_differ(self) -> bool:
        return _lasting(outcome(self.session)) != self.bits

    def forget(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def put_back(self, *, torn: bool) -> None:
        self.forget()
        if torn:
            self.session.model.load_state_dict(self.model)
            self.session.optimizer.load_state_dict(self.optimizer)
        self.session.optimizer.zero_grad()
        torch.set_rng_state(self.generator)


def _lasting(found: Outcome) -> tuple[dict[str, str], dict[str, str]]:
    return found.parameters, found.states


@cache
def budget_bytes(network: Network, steps: int) -> int:
    return int(0.6 * plain_peak(network, steps=steps))


@cache
def expected(network: Network, steps: int) -> Outcome:
    return run_plain(network, steps=steps)


@cache
def moments(kind: str, *, recompute: bool, spill_dir: Path) -> int:
    """How often a run without faults calls what this kind of fault patches."""
    budget_bytes(NETWORK, STEPS), expected(NETWORK, STEPS)  # plain runs of their own, which come once
    target, name, _ = KINDS[kind]
    strikes = Strikes(-1, 0)
    right = getattr(target, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        strikes.now()
        return right(*args, **kwargs)

    with patch.object(target, name, counting):
        never = Fault("slow reads", -1 - PERSISTS)
        found = try_fault(never, spill_dir, snapshot=False, recompute=recompute)
    assert not found.wrong, found.wrong
    return strikes.calls


@contextmanager
def _known_machine(*, slow: bool) -> Iterator[None]:
    """The same rates everywhere; on a slow disk whatever can be made again is."""
    rate = 1e6 if slow else 1e9
    machine = Machine(
        device="cpu",
        device_bytes=16 << 30,
        torch=torch.__version__,
        disk_write_bytes_per_s=rate,
        disk_read_bytes_per_s=rate,
    )
    with patch.object(api, "measured_machine", lambda *_args, **_options: machine):
        yield


def _left_behind(lms: torchlms.LMS, spill_dir: Path, threads: set[threading.Thread]) -> Iterator[str]:
    gc.collect()
    if list(spill_dir.iterdir()):
        yield f"files: {[os.fspath(path) for path in spill_dir.iterdir()]}"
    if private.top_saved_tensor_hooks() is not None:
        yield "saved-tensor hooks"
    if private.top_dispatch_mode() is not None:
        yield "a dispatch mode"
    assert lms._engine is not None
    if list(lms._engine.living()):
        yield "living slots"
    new = [thread for thread in threading.enumerate() if thread not in threads]
    for thread in new:
        thread.join(GRACE_S)  # those of a spill file are told to end, and not waited for
    more = [thread.name for thread in new if thread.is_alive()]
    if more:
        yield f"threads: {more}"
