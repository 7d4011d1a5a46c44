"""A row tried on a device: every value leaves by a rule, whatever the budget, for the networks are small."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from sessions import Outcome, new_session, outcome, train_plainly

import torchlms
from tests.matrix.row import STEPS, Row
from tests.matrix.trial import reloaded

_PLAIN_RUNS = 4
_MORE_RUNS = 12  # where they differ, to see how far
_BUDGET_BYTES = 4 << 30
_ALL_MOVE = {"min_bytes": 512, "move_ops": ["*"], "recompute": False}
_EMPTIED = (0, STEPS - 1)  # steps in which everything leaves before the backward pass, as well


def tried_on(device: str, row: Row, disk_dir: Path) -> None:
    """The bits of plain as far as it repeats them; where it does not, losses no further off than its own."""

    def plainly() -> Outcome:
        with torch.device(device):
            return train_plainly(row.network, row.loop, STEPS)

    def under_lms() -> tuple[Outcome, int]:
        with torch.device(device):
            return _under_lms(row, disk_dir)

    plain = [row.around(plainly) for _ in range(_PLAIN_RUNS)]
    ours, out_bytes = row.around(under_lms)
    unsteady = {name for left, right in pairwise(plain) for name in _names(left, right)}
    assert _names(ours, plain[0]) - unsteady == set()
    if "losses" in unsteady:
        plain += [row.around(plainly) for _ in range(_MORE_RUNS)]
        _assert_within_the_spread(ours, plain)
    assert out_bytes > 0, "nothing left the device, so nothing was shown"


def _names(left: Outcome, right: Outcome) -> set[str]:
    """What differs, without the values that ``differences`` shows."""
    return {text.partition(":")[0] for text in left.differences(right)}


def _assert_within_the_spread(ours: Outcome, plain: list[Outcome]) -> None:
    spread = 0.0
    for number, text in enumerate(ours.losses):
        known = [float.fromhex(run.losses[number]) for run in plain]
        spread = max(spread, max(known) - min(known))
        loss = float.fromhex(text)
        assert min(known) - spread <= loss <= max(known) + spread, f"loss {number}: {loss}, plain {known}"


def _under_lms(row: Row, disk_dir: Path) -> tuple[Outcome, int]:
    """What is left of it, and the bytes that left the device."""
    session = new_session(row.network)
    ends = [row.resumes_at, STEPS] if row.resumes_at else [STEPS]
    out_bytes = 0
    for start, end in zip([0, *ends], ends, strict=False):
        session = reloaded(session) if start else session
        with torchlms.LMS(
            session.model, session.optimizer, budget=_BUDGET_BYTES, disk_dir=disk_dir, rules=_ALL_MOVE
        ) as lms:
            assert lms._engine is not None
            for step in range(start, end):
                lms._engine.saver.empty_before_backward = step in _EMPTIED
                row.loop(session, step)
            out_bytes += lms._engine.store.bytes_out
            found = outcome(session)
        assert outcome(session) == found, "leaving changed something"
    return found, out_bytes
