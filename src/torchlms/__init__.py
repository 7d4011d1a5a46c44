"""Large Model Support for stock PyTorch: train networks that need more memory than the device has.

>>> with torchlms.LMS(model, optimizer, budget="16GiB") as lms:   # doctest: +SKIP
...     ...  # an unmodified training loop
"""

from __future__ import annotations

from torchlms.api import LMS, disable, enable
from torchlms.core.rules import Rules
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
    "disable",
    "enable",
]
