"""Training loops, plain and under LMS, and what is left of them to compare."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from small_networks import Network
from torch import Tensor, nn

import torchlms
from torchlms import api
from torchlms.bench.peak import LedgerMode
from torchlms.core.machine import Machine
from torchlms.memory.ledger import Ledger

T = TypeVar("T")

STEPS = 6
# Rules under which values as small as those of these networks move, and only move.
SMALL = {"min_bytes": 1024, "recompute": False}
DROPPING = {**SMALL, "recompute": True}


@dataclass
class Session:
    """What a loop works on, and the losses that it notes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    network: Network
    losses: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    def note(self, loss: Tensor) -> None:
        self.losses.append(float(loss.detach()).hex())

    def keep(self, name: str, make: Callable[[], T]) -> T:
        """What a loop needs beside model and optimizer, made in its first step."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


Loop = Callable[[Session, int], None]  # one step of a training loop: session, number of the step


@dataclass(frozen=True)
class Outcome:
    """All that training leaves, as exact bits."""

    losses: list[str]
    parameters: dict[str, str]
    gradients: dict[str, str]
    buffers: dict[str, str]
    states: dict[str, str]
    generator: str

    def differences(self, other: Outcome) -> list[str]:
        """What is not equal to the last bit, by name."""
        found = []
        for item in fields(self):
            mine, its = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, dict):
                keys = sorted({*mine, *its})
                found += [f"{item.name} {key}" for key in keys if mine.get(key) != its.get(key)]
            elif mine != its:
                found.append(f"{item.name}: {mine} and {its}")
        return found


@dataclass(frozen=True)
class Watched:
    """A run under LMS, as it was just before leaving."""

    outcome: Outcome
    stats: dict[str, Any]
    report: str
    peak_bytes: int  # of the ledger, over the whole run, recording included
    moved_bytes: int  # over the whole run
    tape: Any
    plan: Any


class WholePeak(Ledger):
    """A ledger that also remembers the peaks before its resets."""

    whole_peak_bytes = 0

    def reset_peak(self) -> None:
        self.whole_peak_bytes = self.highest()
        super().reset_peak()

    def highest(self) -> int:
        return max(self.whole_peak_bytes, self.peak_bytes)


def bits(tensor: Tensor) -> str:
    """A digest of shape, type and every bit."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return f"{bits(tensor.indices())} {bits(tensor.values())}"
    raw = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()[:16]}"


def outcome(session: Session) -> Outcome:
    named = dict(session.model.named_parameters())
    keepers = {"optimizer": session.optimizer, **session.kept}
    return Outcome(
        losses=list(session.losses),
        parameters={name: bits(item) for name, item in named.items()},
        gradients={name: bits(item.grad) for name, item in named.items() if item.grad is not None},
        buffers={name: bits(item) for name, item in session.model.named_buffers()},
        states={
            path: text
            for name, keeper in keepers.items()
            if hasattr(keeper, "state_dict")
            for path, text in _leaves(name, keeper.state_dict())
        },
        generator=" ".join(map(bits, generator_states())),
    )


def generator_states() -> list[Tensor]:
    """Of the default device, and of the CPU, from which data is drawn."""
    states = [torch.get_rng_state()]
    if torch.get_default_device().type == "cuda":
        states.append(torch.cuda.get_rng_state())
    return states


def _leaves(path: str, tree: Any) -> Iterator[tuple[str, str]]:
    """Every tensor and every other thing in nested dicts and lists, as exact text."""
    if isinstance(tree, dict):
        for name, item in tree.items():
            yield from _leaves(f"{path}.{name}", item)
    elif isinstance(tree, (list, tuple)):
        for index, item in enumerate(tree):
            yield from _leaves(f"{path}.{index}", item)
    else:
        yield path, bits(tree) if isinstance(tree, Tensor) else repr(tree)


def more(*case: Any) -> Any:
    """A case that is left to `make more`."""
    return pytest.param(*case, marks=pytest.mark.more)


def new_session(network: Network) -> Session:
    """Always the same weights, and the same generator state to go on from."""
    torch.manual_seed(1234)
    model = network.make_model()
    return Session(model, network.make_optimizer(model), network)


def plain_step(session: Session, step: int) -> None:
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(inputs), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def train_plainly(network: Network, loop: Loop = plain_step, steps: int = STEPS) -> Outcome:
    session = new_session(network)
    for step in range(steps):
        loop(session, step)
    return outcome(session)


run_plain = cache(train_plainly)


def plain_peak(network: Network, loop: Loop = plain_step, steps: int = STEPS) -> int:
    """The highest sum of live storages of a plain run, by a ledger of its own."""
    return run_counted(network, loop, steps)[1]


@cache
def run_counted(network: Network, loop: Loop, steps: int) -> tuple[Outcome, int]:
    """A plain run under a dispatch mode that counts what is live, and changes nothing; and its peak."""
    session = new_session(network)
    ledger = Ledger()
    mode = LedgerMode(ledger, torch.device("cpu"))
    mode.count([*session.model.parameters(), *session.model.buffers()])
    with mode:
        for step in range(steps):
            loop(session, step)
    left, peak_bytes = outcome(session), ledger.peak_bytes
    del session
    gc.collect()
    return left, peak_bytes


def ledger_of(lms: torchlms.LMS) -> WholePeak:
    ledger = lms._engine.device.ledger  # type: ignore[union-attr]
    assert isinstance(ledger, WholePeak)
    return ledger


def moved_bytes(lms: torchlms.LMS) -> int:
    """What left the device since LMS was entered."""
    assert lms._engine is not None
    return lms._engine.store.bytes_out


@contextmanager
def open_lms(session: Session, budget: int | str, disk_dir: Path, **options: Any) -> Iterator[torchlms.LMS]:
    """LMS as a user would write it, with a ledger that remembers its highest peak."""
    options.setdefault("rules", SMALL)
    with torchlms.LMS(session.model, session.optimizer, budget=budget, disk_dir=disk_dir, **options) as lms:
        lms._engine.device.ledger.__class__ = WholePeak  # type: ignore[union-attr]
        yield lms


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which moving costs so much that whatever can be made again is."""
    measured = api.measured_machine

    def slow(*args: Any, **options: Any) -> Machine:
        found = measured(*args, **options)
        return replace(found, disk_write_bytes_per_s=1e6, disk_read_bytes_per_s=1e6)

    monkeypatch.setattr(api, "measured_machine", slow)


def maybe_lms(session: Session, budget: int | None, disk_dir: Path) -> Any:
    """LMS, or nothing when there is no budget: for loops that are written once."""
    return nullcontext() if budget is None else open_lms(session, budget, disk_dir)


def run_lms(
    network: Network,
    budget: int | str,
    disk_dir: Path,
    loop: Loop = plain_step,
    steps: int = STEPS,
    **options: Any,
) -> Watched:
    session = new_session(network)
    with open_lms(session, budget, disk_dir, **options) as lms:
        for step in range(steps):
            loop(session, step)
        watched = watch(session, lms)
    assert outcome(session) == watched.outcome, "leaving changed something"
    return watched


def watch(session: Session, lms: torchlms.LMS) -> Watched:
    return Watched(
        outcome=outcome(session),
        stats=lms.stats(),
        report=lms.report(),
        peak_bytes=ledger_of(lms).highest(),
        moved_bytes=moved_bytes(lms),
        tape=lms.tape,
        plan=lms.plan,
    )


def assert_same_bits(
    network: Network,
    loop: Loop,
    disk_dir: Path,
    *,
    share: float = 0.6,
    steps: int = STEPS,
    **options: Any,
) -> Watched:
    """Train plainly, and under ``share`` of the plain peak; the bits are the same, and values moved."""
    plain = run_plain(network, loop, steps)
    budget_bytes = int(share * plain_peak(network, loop))
    watched = run_lms(network, budget_bytes, disk_dir, loop, steps, **options)
    assert watched.outcome.differences(plain) == []
    assert watched.moved_bytes > 0, "nothing moved, so nothing was shown"
    assert watched.peak_bytes <= budget_bytes
    return watched


_smallest: dict[tuple[str, Loop], int] = {}


def smallest_budget(network: Network, disk_dir: Path, loop: Loop = plain_step, *, tries: int = 8) -> int:
    """A budget that works, found as a user would: ask for too little, then for what the error says."""
    known = _smallest.get((network.name, loop))
    if known is not None:
        return known
    budget_bytes = int(0.3 * plain_peak(network, loop))
    for _ in range(tries):
        error = refusal(network, budget_bytes, disk_dir, loop)
        if error is None:
            _smallest[network.name, loop] = budget_bytes
            return budget_bytes
        assert "smallest budget" in str(error)
        assert error.smallest_bytes > budget_bytes
        budget_bytes = error.smallest_bytes
    raise AssertionError(f"no budget up to {budget_bytes} works after {tries} tries")


def refusal(
    network: Network, budget_bytes: int, disk_dir: Path, loop: Loop = plain_step
) -> torchlms.BudgetTooSmall | None:
    """What LMS says to this budget, None if it works."""
    try:
        run_lms(network, budget_bytes, disk_dir, loop, 4)
    except torchlms.BudgetTooSmall as error:
        return error
    return None
