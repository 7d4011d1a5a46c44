"""Large Model Support for stock PyTorch: train networks that need more memory than the device has.

>>> with torchlms.LMS(model, optimizer, budget="16GiB") as lms:   # doctest: +SKIP
...     ...  # an unmodified training loop
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchlms.errors import (
    BadOption,
    BudgetTooSmall,
    HostBudgetTooSmall,
    LMSError,
    NotSupported,
    PlanMismatch,
    ReplayFailed,
    SpillError,
    StepTorn,
    VerifyFailed,
)

if TYPE_CHECKING:
    from torchlms.api import LMS, current, disable, enable, reclaim, stats
    from torchlms.core.rules import Rules

__version__ = "0.1.0"

__all__ = [
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


def __getattr__(name: str) -> Any:
    """What needs torch, when first asked for: a script that we run imports torch in its own time."""
    if name not in ("LMS", "Rules", "api", "current", "disable", "enable", "reclaim", "stats"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = import_module("torchlms.core.rules" if name == "Rules" else "torchlms.api")
    found = place if name == "api" else getattr(place, name)
    return globals().setdefault(name, found)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
