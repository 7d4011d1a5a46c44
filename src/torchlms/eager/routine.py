"""Routine: one kind of micro-step, known by the first tensor it saves, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from torchlms.core.tape import Tape
from torchlms.eager.program import Program

Signature = tuple[tuple[int, ...], torch.dtype]

RECORDINGS = 2  # the first warms kernels up and finds workspaces, the second is timed
MOST_RECORDINGS = 6  # a routine that keeps changing is run without a plan


class Verdict(Enum):
    """What to do when this routine comes next."""

    RECORD = "record"
    FOLLOW = "follow"  # a plan is there
    FITS = "fits"  # nothing needs to move
    IMPROVISE = "improvise"  # it never repeats; every value finds its own way


@dataclass(slots=True)
class Routine:
    """Tapes of the last recordings, the program made of them, and how often reality differed."""

    signature: Signature
    verdict: Verdict = Verdict.RECORD
    tapes: list[Tape] = field(default_factory=list)
    program: Program | None = None
    recordings: int = 0
    strayed: int = 0  # micro-steps that did not match the program
    replans: int = 0
    steps: int = 0  # micro-steps that followed the present program

    def ready_to_plan(self) -> bool:
        return self.verdict is Verdict.RECORD and len(self.tapes) >= RECORDINGS

    def recorded(self, tape: Tape) -> None:
        """Keep ``tape`` for planning; an unlike predecessor is forgotten."""
        if self.tapes and self.tapes[-1].fingerprint != tape.fingerprint:
            self.tapes.clear()
        self.tapes.append(tape)
        self.recordings += 1
        if self.recordings >= MOST_RECORDINGS and len(self.tapes) < RECORDINGS:
            self.verdict = Verdict.IMPROVISE

    def stray(self) -> None:
        """The step did not match: record it again, unless that has been tried enough."""
        self.strayed += 1
        self.tapes.clear()
        self.program = None
        self.steps = 0
        self.verdict = Verdict.RECORD if self.recordings < MOST_RECORDINGS else Verdict.IMPROVISE
