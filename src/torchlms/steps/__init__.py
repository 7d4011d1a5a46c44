"""Steps: what each step of one's own loop took, and a look at some of them with a profiler."""

from torchlms.steps.log import StepLog
from torchlms.steps.window import ProfileWindow

__all__ = ["ProfileWindow", "StepLog"]
