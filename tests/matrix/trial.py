"""A row tried: trained plainly and under LMS, compared to the last bit, told in the words of the table."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sessions import (
    Outcome,
    Session,
    Watched,
    new_session,
    open_lms,
    outcome,
    plain_peak,
    plain_step,
    run_counted,
    run_plain,
    train_plainly,
    watch,
)

from tests.matrix.row import STEPS, Row
from torchlms.bench.peak import LedgerMode
from torchlms.memory.ledger import Ledger


def tried(row: Row, rules: dict[str, Any], disk_dir: Path) -> str:
    """What the table says of ``row`` under these rules; AssertionError where that would not be true."""
    return refusal(row, rules, disk_dir) if row.refused else sameness(row, rules, disk_dir)


def sameness(row: Row, rules: dict[str, Any], disk_dir: Path) -> str:
    """The same bits within the budget, by moving or dropping something; or what is said of the row instead,
    and no longer than that is so."""
    plain, peak_bytes = trained_plainly(row)
    budget_bytes = int(row.share * peak_bytes)
    runs: list[Watched] = row.around(lambda: list(trained(row, budget_bytes, rules, disk_dir)))
    if row.any_mode:
        assert runs[-1].outcome.differences(plain), "the same bits as without a mode: say so in the row"
        plain = row.around(lambda: trained_under_a_mode(row))
    assert runs[-1].outcome.differences(plain) == []
    for run in runs:
        assert run.moved_bytes > 0 or run.stats["replayed_ops"] > 0, "nothing moved, so nothing was shown"
        assert run.peak_bytes <= budget_bytes
    bits = f"bits of any dispatch mode: {row.any_mode}" if row.any_mode else "same bits"
    return "; ".join([bits, *manner(runs[-1], rules)])


def trained_under_a_mode(row: Row) -> Outcome:
    """What plain PyTorch leaves when a dispatch mode looks on that changes nothing."""
    with LedgerMode(Ledger(), torch.device("cpu")):
        return train_plainly(row.network, row.loop, STEPS)


@cache
def trained_plainly(row: Row) -> tuple[Outcome, int]:
    """What plain PyTorch leaves, which it leaves twice, and its peak."""
    plain = row.around(lambda: train_plainly(row.network, row.loop, STEPS))
    again, peak_bytes = row.around(lambda: run_counted(row.network, row.loop, STEPS))
    if row.any_mode:  # to count is one
        again = row.around(lambda: train_plainly(row.network, row.loop, STEPS))
    assert again.differences(plain) == [], "plain PyTorch does not repeat itself: measure its spread"
    return plain, peak_bytes


def trained(row: Row, budget_bytes: int, rules: dict[str, Any], disk_dir: Path) -> Iterator[Watched]:
    """Train under LMS; a row that resumes is left and entered again, each time in an LMS of its own."""
    session = new_session(row.network)
    ends = [row.resumes_at, STEPS] if row.resumes_at else [STEPS]
    for start, end in zip([0, *ends], ends, strict=False):
        session = reloaded(session) if start else session
        with open_lms(session, budget_bytes, disk_dir, rules=rules) as lms:
            for step in range(start, end):
                row.loop(session, step)
            watched = watch(session, lms)
        assert outcome(session) == watched.outcome, "leaving changed something"
        yield watched


def reloaded(session: Session) -> Session:
    """Another session with other weights, brought to where ``session`` is by what people save."""
    file = io.BytesIO()
    generator_states = [torch.get_rng_state(), torch.cuda.get_rng_state_all()]
    torch.save([session.model.state_dict(), session.optimizer.state_dict(), generator_states], file)
    file.seek(0)
    network, losses = session.network, session.losses
    del session
    fresh = new_session(network)
    model_state, optimizer_state, generator_states = torch.load(file)
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.fill_(float("nan"))
    fresh.model.load_state_dict(model_state)
    fresh.optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(generator_states[0])
    torch.cuda.set_rng_state_all(generator_states[1])
    fresh.losses = losses
    return fresh


def manner(run: Watched, rules: dict[str, Any]) -> Iterator[str]:
    """How it went, as far as that is the same on every machine."""
    if run.plan is None:
        yield "slower, without a plan"
    elif run.stats["strayed"]:
        yield "slower, for steps are not as planned"
    if rules.get("recompute") and not any(value.recipe for value in run.tape.values):
        yield "nothing that could be made again"


def refusal(row: Row, rules: dict[str, Any], disk_dir: Path) -> str:
    """The loop works plainly, under LMS it is refused in clear words, and nothing is broken by that."""
    train_plainly(row.network, row.loop, 1)
    session = new_session(row.network)
    budget_bytes = int(row.share * plain_peak(row.network, plain_step, STEPS))
    with open_lms(session, budget_bytes, disk_dir, rules=rules):
        generator_state = torch.get_rng_state()
        try:
            row.loop(session, 0)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        else:
            raise AssertionError(f"not refused any more, with {row.refused!r}: say so in the row")
        torch.set_rng_state(generator_state)
        for step in range(STEPS):
            plain_step(session, step)
    assert outcome(session).differences(run_plain(row.network, plain_step, STEPS)) == []
    assert row.refused in said, said
    return f"refused: `{said.split('. ')[0]}`"
