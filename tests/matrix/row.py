"""A row of the matrix: one kind of training loop, and a network on which it matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sessions import DROPPING, SMALL, Loop, plain_step
from small_networks import Network

from tests.matrix.stack import PERCEPTRON

STEPS = 8  # as many as it takes until values that were tried are made again
Around = Callable[[Callable[[], Any]], Any]  # runs a whole training, and returns what it returns

# How each row is run: rules under which values as small as these move, and may be made again.
WAYS: dict[str, dict[str, Any]] = {"moved": SMALL, "made again": DROPPING}


def _able() -> str:
    return ""


def directly(training: Callable[[], Any]) -> Any:
    return training()


@dataclass(frozen=True, eq=False)
class Row:
    """One row. ``what`` is for the reader of the table; the rest says how it is run."""

    name: str
    what: str
    loop: Loop = plain_step
    network: Network = PERCEPTRON
    share: float = 0.7  # of the plain peak: the budget
    around: Around = directly
    resumes_at: int = 0  # before this step training ends, and goes on elsewhere from a file
    refused: str = ""  # what the error says, where this cannot be done under LMS
    any_mode: str = ""  # what torch computes otherwise as soon as any dispatch mode is on
    slow: bool = False
    unable: Callable[[], str] = _able  # why it cannot be run here, where it cannot
    only_cpu: str = ""  # why it is not run on other devices

    def __str__(self) -> str:
        return self.name
