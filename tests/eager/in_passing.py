"""Plans that make in passing whatever something else is made from, be it of use or not."""

from __future__ import annotations

import math

import pytest

from torchlms.core import joint
from torchlms.core.trials import Trials


def make_all_in_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, wherever there is such a plan."""
    monkeypatch.setattr(joint, "_make_in_passing", _all)
    monkeypatch.setattr(joint, "_flip_groups", lambda *_: None)


def _all(trials: Trials, *_: object) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trials, "cost_s", property(lambda _: math.inf))  # whatever comes is better
        trials.of(trials.best, frozenset(source for value in trials.best for source in value.sources))
