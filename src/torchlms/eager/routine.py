"""Routine: one kind of micro-step, known by the first tensor it saves, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from torchlms.core.tape import Tape
from torchlms.eager.program import Program

Signature = tuple[tuple[int, ...], torch.dtype]

TIMINGS = 2  # steps under a first plan in which each op is timed
MOST_RECORDINGS = 6  # a routine that keeps changing is run without a plan


class Verdict(Enum):
    """What to do when this routine comes next."""

    RECORD = "record"
    FOLLOW = "follow"  # a plan is there
    FITS = "fits"  # nothing needs to move
    IMPROVISE = "improvise"  # it never repeats; every value finds its own way


@dataclass(slots=True)
class Routine:
    """The last tape, the program made of it, and how often reality differed."""

    signature: Signature
    verdict: Verdict = Verdict.RECORD
    tape: Tape | None = None
    program: Program | None = None
    timings: list[list[tuple[str, float]]] = field(default_factory=list)
    settled: bool = False  # the program was made from those timings
    recordings: int = 0
    strayed: int = 0  # micro-steps that did not match the program
    replans: int = 0
    steps: int = 0  # micro-steps that followed the present program

    def recorded(self, tape: Tape) -> None:
        self.tape = tape
        self.timings.clear()
        self.settled = False
        self.recordings += 1

    def stray(self) -> None:
        """The step did not match: record it again, unless that has been tried enough."""
        self.strayed += 1
        self.tape = self.program = None
        self.steps = 0
        self.verdict = Verdict.RECORD if self.recordings < MOST_RECORDINGS else Verdict.IMPROVISE
