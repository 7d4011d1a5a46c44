"""The public names: these, sorted, each with a docstring. A change here is a change of the promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torchlms

ROOT = Path(__file__).resolve().parent.parent

NAMES = [
    "BadOption",
    "BudgetTooSmall",
    "HostBudgetTooSmall",
    "LMS",
    "LMSError",
    "NotSupported",
    "PlanMismatch",
    "ReplayFailed",
    "Rules",
    "SpillError",
    "StepTorn",
    "VerifyFailed",
    "__version__",
    "current",
    "disable",
    "enable",
    "reclaim",
    "stats",
]

pytestmark = pytest.mark.skipif(torchlms.__file__ is None, reason="no torchlms/__init__.py yet")


def test_names_are_these_and_sorted() -> None:
    assert list(torchlms.__all__) == NAMES == sorted(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "__version__"])
def test_each_has_a_docstring(name: str) -> None:
    doc = getattr(torchlms, name).__doc__
    assert doc
    assert doc.strip()


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("Error", "Small", "Option", "Mismatch"))])
def test_every_error_has_one_root(name: str) -> None:
    assert issubclass(getattr(torchlms, name), torchlms.LMSError)


def test_version_is_the_one_in_pyproject() -> None:
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated
    assert torchlms.__version__ == stated.group(1)
