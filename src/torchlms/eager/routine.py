"""Routine: one kind of micro-step, known by what it saves first, and what is known about it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import Enum

import torch

from torchlms.core.tape import Tape
from torchlms.eager.program import Program, Trust
from torchlms.eager.timer import Lap

TIMINGS = 2  # steps under a first plan in which each op is timed
FORGIVING_STEPS = 20
STRAYS = 2  # in a row, and the step is taken to be another one
FEW_UNFINISHED = 6  # recordings without a backward pass; from then on
SELDOM = 16  # one in so many is tried
MOST_RECORDINGS = 6  # a routine that keeps changing is run without a plan


log = logging.getLogger("torchlms")


@dataclass(frozen=True, slots=True)
class Signature:
    """What one kind of micro-step is known by: what it saves first, where, and what it met before that.

    ``met`` are the shapes of tensors that were saved before it and never move, such as inputs that numpy
    holds: a smaller last batch may show in these alone.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str = ""
    met: tuple[tuple[int, ...], ...] = ()


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
    check_wanted: bool = False  # the ops are to be timed once more
    checked: list[tuple[str, float]] | None = None  # what that gave
    trust: Trust = field(default_factory=Trust)
    rise_bytes: int = 0  # memory at the peak beyond that before the step
    refused_bytes: int = 0  # the smallest budget that a plan of its tape was found to need, if none was made
    recordings: int = 0
    strayed: int = 0  # micro-steps that did not match the program
    in_a_row: int = 0  # of these, the last ones without one between that did
    unfinished: int = 0  # recordings without a backward pass
    replans: int = 0
    evicted_in: int | None = None  # the last of its laps that had to evict
    growths: int = 0  # times that it was planned again because more was there before it
    grown_bytes: int = 0  # more than recorded, seen before one of them
    steps: int = 0  # micro-steps that followed the present program
    laps: int = 0  # that followed any
    waiting: bool = False  # for its second time, to be recorded
    met_first: int = -1  # in which micro-step of the program
    met_last: int = -1
    lap: Lap | None = None  # of the last of them
    wants_lap: bool = True  # somebody asks how long the next one takes
    notes: object | None = None  # of whoever times its plans; void with a new recording or budget

    def met(self, step: int) -> None:
        """A micro-step of this kind begins."""
        if self.waiting and self.met_first >= 0:
            self.waiting, self.verdict = False, Verdict.RECORD
        self.met_first = step if self.met_first < 0 else self.met_first
        self.met_last = step

    def wait_for_another(self) -> None:
        """Improvise now, and be recorded when such a step comes again."""
        self.waiting = True
        self.improvise()

    def recorded(self, tape: Tape) -> None:
        self.tape = tape
        self.unfinished = 0
        self.trust = Trust()
        self.timings.clear()
        self.settled = self.check_wanted = False
        self.checked = self.notes = None
        self.refused_bytes = 0
        self.recordings += 1

    def stray(self) -> None:
        """The step did not match. Where that happens twice in a row it is recorded again, unless that has
        been tried enough; a step now and then that has another loss is none of the plan's business."""
        self.strayed += 1
        self.in_a_row += 1
        if self.in_a_row < STRAYS and self.program is not None:
            return
        self.in_a_row = 0
        self.tape = self.program = None
        self.steps = 0
        if self.recordings < MOST_RECORDINGS:
            self.verdict = Verdict.RECORD
        else:
            self.improvise()
            log.warning(
                "steps that first save a tensor of shape %s keep changing: going on without a plan, slowly",
                self.signature.shape,
            )

    def followed(self, lap: Lap | None = None) -> None:
        """A step kept to the program; after enough of them earlier changes are forgotten."""
        self.steps += 1
        self.laps += 1
        self.in_a_row = 0
        self.lap = lap
        if self.steps == FORGIVING_STEPS:
            self.recordings = 1

    @property
    def wants_times(self) -> bool:
        """Whether the ops of the next step are to be timed."""
        return self.check_wanted or len(self.timings) < TIMINGS

    def timed(self, times: list[tuple[str, float]]) -> None:
        """Take the times of a step's ops."""
        if self.check_wanted:
            self.checked, self.check_wanted = times, False
        else:
            self.timings.append(times)

    def worth_recording(self) -> bool:
        """Whether this micro-step is to be recorded. One that never has a backward pass, such as a metric
        that is computed with gradients on, is tried seldom."""
        if self.unfinished < FEW_UNFINISHED:
            return True
        self.unfinished += 1
        return self.unfinished % SELDOM == 0

    def improvise(self) -> None:
        """Give planning up: every value finds its own way."""
        self.program = None
        self.verdict = Verdict.IMPROVISE

    def reconsider(self) -> None:
        """Plan anew from the tape that there is, under what has changed."""
        if self.tape is not None:
            self.verdict = Verdict.RECORD
            self.steps = self.replans = 0
            self.notes = None

    def doubt(self) -> None:
        """What fitted when it was recorded may fit no more: record again."""
        self.tape = self.program = None
        self.verdict = Verdict.RECORD
