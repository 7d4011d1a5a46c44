"""Plans that make in passing whatever something else is made from, be it of use or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchlms.core import joint
from torchlms.core.drops import Drops
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall

if TYPE_CHECKING:
    import pytest


def make_all_in_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, wherever there is such a plan."""
    monkeypatch.setattr(joint, "_make_in_passing", _all)
    monkeypatch.setattr(joint, "_flip_groups", lambda *_: None)


def _all(trials: Any, *_: Any) -> None:
    values = trials.best
    drops = Drops(values, frozenset(source for value in values for source in value.sources))
    try:
        made = trials._make(drops, 1.0)
    except (BudgetTooSmall, HostBudgetTooSmall):
        return
    trials._made[joint._key(drops)] = made
    trials._best = drops
