"""Errors keep their figures on the way from one process to another."""

from __future__ import annotations

import errno
import pickle

import pytest

from torchlms import errors

MADE = (
    errors.LMSError("said"),
    errors.BudgetTooSmall("said", smallest_bytes=3),
    errors.HostBudgetTooSmall("said", missing_bytes=5),
    errors.StepTorn("said", restored=True, smallest_bytes=7),
    errors.BadOption("said"),
    errors.PlanMismatch("said"),
    errors.NotSupported("said"),
    errors.ReplayFailed("said"),
    errors.VerifyFailed("said"),
    errors.SpillError(errno.ENOSPC, "said", "spill"),
)


def test_none_is_forgotten() -> None:
    assert {type(error).__name__ for error in MADE} == set(errors.__all__)


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_an_error_arrives_as_it_was_sent(error: errors.LMSError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert vars(arrived) == vars(error)
    if isinstance(error, errors.SpillError):
        assert (arrived.errno, arrived.filename) == (error.errno, error.filename)
