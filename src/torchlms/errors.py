"""The errors a user can meet.

LMSError                  anything this package refuses or could not do
├── BudgetTooSmall        the device budget does not do; carries what is known to be needed
├── HostBudgetTooSmall    host memory or disk cannot hold what must leave the device
├── BadOption             an option that cannot be read, or that contradicts another
├── PlanMismatch          a plan or tape file made for something else
├── NotSupported          a device, nesting or transform this package does not handle
├── StepTorn              memory ran out half-way through optimizer.step() (also a RuntimeError)
├── VerifyFailed          a check found other bits than there should be (also a RuntimeError)
├── ReplayFailed          a dropped tensor cannot be made again (also a RuntimeError)
└── SpillError            the spill file could not be made, written or read (also an OSError)
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BadOption",
    "BudgetTooSmall",
    "HostBudgetTooSmall",
    "LMSError",
    "NotSupported",
    "PlanMismatch",
    "ReplayFailed",
    "SpillError",
    "StepTorn",
    "VerifyFailed",
]


class LMSError(Exception):
    """Root of every error this package raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """With its figures: pools and launchers send errors from one process to another."""
        return _made_again, (type(self), *self.args), self.__dict__


class BudgetTooSmall(LMSError):
    """The device budget is below what a single op needs at once.

    ``smallest_bytes`` is the smallest budget for which there is a plan, if a whole step was recorded. In a
    step that is being recorded it is a budget to try: what has run so far needs about that, as the message
    says, and more may come later. Without a plan a step may run in somewhat less, slowly.
    """

    def __init__(self, message: str, *, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class HostBudgetTooSmall(LMSError):
    """Host memory and disk together cannot hold what must leave; ``missing_bytes`` says by how much.

    Raised on entering where a given plan needs more of both than the budgets allow.
    """

    def __init__(self, message: str, *, missing_bytes: int) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class BadOption(LMSError, ValueError):
    """An option could not be read, or contradicts another."""


class PlanMismatch(LMSError):
    """A plan or tape file does not belong to this model, shape, torch version or schema, or the plan does not
    hold for this step."""


class NotSupported(LMSError):
    """Something this package does not handle, said before anything was changed."""


class ReplayFailed(LMSError, RuntimeError):
    """What a dropped tensor is made from was written in a way that nothing reports, or an op failed that ran
    again for it, or found less room than in forward where deterministic kernels were asked for."""


class StepTorn(LMSError, RuntimeError):
    """Some tensors of an update were written and others were not. ``restored`` says whether parameters and
    optimizer states are again those from before the step; ``smallest_bytes`` is a budget to try, 0 where
    nothing is known of that."""

    def __init__(self, message: str, *, restored: bool, smallest_bytes: int = 0) -> None:
        super().__init__(message)
        self.restored = restored
        self.smallest_bytes = smallest_bytes


class VerifyFailed(LMSError, RuntimeError):
    """``verify=`` or ``check`` found other bits than there should be; names the value and its way."""


class SpillError(LMSError, OSError):
    """The spill file could not be made, written or read; ``errno`` is the system's reason."""

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple(OSError.__reduce__(self))  # which knows of the file's name


def _made_again(kind: type[LMSError], *args: Any) -> LMSError:
    return kind.__new__(kind, *args)
