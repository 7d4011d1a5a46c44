"""The budget changes while training runs: it is kept at once, plans are for it, the bits are plain's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.nn.functional as F
from sessions import Session, ledger_of, new_session, open_lms, outcome, plain_peak, plain_step, run_plain
from small_networks import NETWORKS

import torchlms
from torchlms import options
from torchlms.core.plan import Choice

MLP = NETWORKS["mlp"]
ROOMY, TIGHT = (int(share * plain_peak(MLP)) for share in (0.9, 0.55))


def moved(lms: torchlms.LMS) -> int:
    assert lms.plan is not None
    return sum(move.choice is Choice.DISK for move in lms.plan.moves)


def test_down_and_up_again_between_steps(spill_dir: Path) -> None:
    session = new_session(MLP)
    with open_lms(session, ROOMY, spill_dir) as lms:
        for step in range(6):
            plain_step(session, step)
        few = moved(lms)
        lms.set_budget(TIGHT)
        ledger_of(lms).reset_peak()
        for step in range(6, 12):
            plain_step(session, step)
        assert ledger_of(lms).peak_bytes <= TIGHT
        assert lms.plan is not None
        assert lms.plan.budget.device_bytes == TIGHT
        assert lms.stats()["budget_bytes"] == TIGHT
        assert lms.stats()["record_steps"] == 1, "nothing is recorded again"
        assert lms.stats()["late_fetches"] == 0, "the steps follow a plan"
        assert moved(lms) > few
        lms.set_budget(ROOMY)
        for step in range(12, 16):
            plain_step(session, step)
        assert moved(lms) == few
    assert outcome(session).differences(run_plain(MLP, steps=16)) == []


def test_the_other_tiers_stay(spill_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits on the disk is ours: it is no longer free, and not to be taken off."""
    session = new_session(MLP)
    with open_lms(session, ROOMY, spill_dir, disk_budget="4MiB") as lms:
        for step in range(4):
            plain_step(session, step)
        monkeypatch.setattr(options, "disk_free_bytes", lambda path: 0)
        lms.set_budget(TIGHT)
        assert lms._director is not None
        assert lms._director.budget.disk_bytes == 4 << 20
        for step in range(4, 8):
            plain_step(session, step)
        assert moved(lms)
    assert outcome(session).differences(run_plain(MLP, steps=8)) == []


@pytest.mark.parametrize("when", [0, 4])
def test_down_in_the_middle_of_a_step(when: int, spill_dir: Path) -> None:
    """While it is recorded, and while it follows a plan for more."""

    def lowering(session: Session, step: int, lms: torchlms.LMS | None) -> None:
        inputs, target = session.network.batch(step)
        session.optimizer.zero_grad()
        loss = F.cross_entropy(session.model(inputs), target)
        if lms is not None and step == when:
            lms.set_budget(TIGHT)
            ledger_of(lms).reset_peak()
        loss.backward()
        session.optimizer.step()
        session.note(loss)

    plain, session = new_session(MLP), None
    for step in range(8):
        lowering(plain, step, None)
    expected = outcome(plain)
    session = new_session(MLP)
    with open_lms(session, ROOMY, spill_dir) as lms:
        for step in range(8):
            lowering(session, step, lms)
        assert ledger_of(lms).highest() <= ROOMY
        assert lms.stats()["peak_device_bytes"] <= TIGHT
        assert lms.state == "guard"
    assert outcome(session).differences(expected) == []


def test_too_little_is_refused_and_changes_nothing(spill_dir: Path) -> None:
    session = new_session(MLP)
    with open_lms(session, ROOMY, spill_dir) as lms:
        for step in range(5):
            plain_step(session, step)
        with pytest.raises(torchlms.BudgetTooSmall, match="in use already"):
            lms.set_budget(8000)
        with pytest.raises(torchlms.BadOption):
            lms.set_budget("lots")
        assert lms.stats()["budget_bytes"] == ROOMY
        plain_step(session, 5)
        assert lms.stats()["record_steps"] == 1
    assert outcome(session).differences(run_plain(MLP)) == []
    with pytest.raises(torchlms.NotSupported, match="inside the with block"):
        lms.set_budget(ROOMY)


# -- on demand -----------------------------------------------------------------------------------


def test_everything_leaves_when_asked_to(spill_dir: Path) -> None:
    """Between forward and backward, of a step that follows a plan for a budget with room to spare."""
    session = new_session(MLP)
    with open_lms(session, ROOMY, spill_dir) as lms:
        for step in range(6):
            plain_step(session, step)
        inputs, target = MLP.batch(6)
        session.optimizer.zero_grad()
        loss = F.cross_entropy(session.model(inputs), target)
        before = lms.stats()
        assert before["inactive_device_bytes"] > 0
        freed = lms.reclaim()
        after = torchlms.stats()
        assert freed == before["inactive_device_bytes"]
        assert after["inactive_device_bytes"] == 0
        assert after["active_device_bytes"] <= before["active_device_bytes"]
        assert after["reclaims"] == before["reclaims"] + 1
        assert after["full_reclaims"] == before["full_reclaims"] + 1
        loss.backward()
        session.optimizer.step()
        session.losses.append(loss.item().hex())
        assert torchlms.reclaim() == 0, "nothing is saved"
    assert outcome(session).differences(run_plain(MLP, steps=7)) == []


def test_without_one_that_is_on() -> None:
    assert torchlms.stats() == {"state": "off"}
    assert torchlms.reclaim() == 0
    with pytest.raises(torchlms.NotSupported, match="inside the with block"):
        torchlms.LMS(new_session(MLP).model, budget=ROOMY).reclaim()
