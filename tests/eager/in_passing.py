"""Plans that make values in passing, be it of use or not."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from torchlms.core import joint
from torchlms.core.tape import Value
from torchlms.core.trials import Trials


def make_in_passing(
    monkeypatch: pytest.MonkeyPatch, seed: int | None = None, *, drop_all: bool = False
) -> None:
    """From here on, wherever there is such a plan: all that something else is made from, or some of it. With
    ``drop_all`` whatever can be is dropped, also where all would fit."""

    def instead(trials: Trials, ranked: Sequence[Value], *_: object) -> None:
        values = ranked if drop_all else trials.best
        sources = sorted({source for value in values for source in value.sources})
        dice = random.Random(seed)
        passing = frozenset(source for source in sources if seed is None or dice.random() < 0.6)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Trials, "cost_s", property(lambda _: math.inf))  # whatever comes is better
            trials.of(values, passing)

    if drop_all:
        monkeypatch.setattr(Trials, "free_of_stalls", property(lambda _: False))
    monkeypatch.setattr(joint, "_make_in_passing", instead)
    monkeypatch.setattr(joint, "_flip_groups", lambda *_: None)
