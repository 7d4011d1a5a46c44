"""Answer: what ``torchlms fit`` found, as a record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchlms.core.curve import baseline_curve
from torchlms.core.rules import unmatched
from torchlms.core.tape import Kind
from torchlms.core.units import bytes_text
from torchlms.errors import BadOption
from torchlms.fit.curve import CurvePoint, curve
from torchlms.fit.largest import Batch, Batches
from torchlms.fit.loading import NAME, loading_ops
from torchlms.fit.outlook import Outlook, look
from torchlms.fit.times import kept_busy, outgrew_its_batch

_WATCHED_S = 20e-6  # about what it takes Python to watch one op
_NOTICED = 0.1  # of the step

if TYPE_CHECKING:
    from torchlms.core.tape import Tape
    from torchlms.fit.question import Evidence, Question

SHARES = (0.95, 0.80, 0.50)  # of the speed in memory, that a batch is asked to keep


@dataclass(frozen=True, slots=True)
class Largest:
    """Batch sizes under one budget. None: not even one sample. ``keeping`` pairs a share with its batch."""

    fits: Batch | None
    unmoved: Batch | None
    keeping: tuple[tuple[float, Batch | None], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found, and what it rests on. ``points`` and ``largest`` only where they were asked for."""

    evidence: Evidence
    outlook: Outlook
    points: tuple[CurvePoint, ...] | None
    largest: Largest | None
    notes: tuple[str, ...]

    @property
    def samples_per_s(self) -> float:
        """Predicted speed; 0 where the step does not run or the batch is not known."""
        predicted = self.outlook.predicted
        if predicted is None or predicted.step_s <= 0:
            return 0.0
        return self.evidence.batch_size / predicted.step_s


def answer(question: Question, evidence: Evidence) -> Answer:
    """Everything that ``question`` asks, from ``evidence`` alone: no device is needed."""
    if question.largest and evidence.scale is None:
        raise BadOption(
            "--largest needs recordings of two batch sizes: --record 50,100, or --tape and --batch twice"
        )
    tape, machine, budget, rules = evidence.tape, evidence.machine, evidence.budget, evidence.rules
    largest = _largest(evidence) if question.largest else None
    return Answer(
        evidence=evidence,
        outlook=look(tape, machine, budget, rules),
        points=curve(tape, machine, budget, rules=rules) if question.curve else None,
        largest=largest,
        notes=(*_notes(evidence), *_bound_notes(largest)),
    )


def _largest(evidence: Evidence) -> Largest:
    assert evidence.scale is not None
    batches = Batches(evidence.scale, evidence.machine, evidence.budget, evidence.rules)
    return Largest(
        fits=batches.largest(),
        unmoved=batches.unmoved(),
        keeping=tuple((share, batches.keeping(share)) for share in SHARES),
    )


def _bound_notes(largest: Largest | None) -> tuple[str, ...]:
    if largest is None or largest.fits is None or not largest.fits.at_least:
        return ()
    return (f"the largest batch is at least {largest.fits.batch_size}: no larger one was tried",)


def _never_stepped_bytes(tape: Tape) -> int:
    """Bytes of the parameters, if no op of the step updates one of them; else 0.

    A view of a parameter is written by an op, too; what updates has a name that ends in ``_``.
    """
    sizes = {value.id: value.size_bytes for value in tape.values if value.kind is Kind.PARAMETER}
    updates = (op for op in tape.ops if op.name.removeprefix("aten.").partition(".")[0].endswith("_"))
    if any(written in sizes for op in updates for written in op.writes):
        return 0
    return sum(sizes.values())


def _notes(evidence: Evidence) -> tuple[str, ...]:
    """What a reader should know before believing the figures."""
    notes = [
        f"the rule {pattern} matches nothing in this step: perhaps it is misspelt"
        for pattern in unmatched(evidence.rules, evidence.tape)
    ]
    tape, machine, scale = evidence.tape, evidence.machine, evidence.scale
    same = not machine.link if tape.device == "cpu" else tape.device == machine.device
    if not same:
        notes.append(
            f"op times are those of {tape.device}, where the tape was recorded; copies are those of "
            f"{machine.device}"
        )
    watched_s, ops_s = len(tape.ops) * _WATCHED_S, sum(op.time_s for op in tape.ops)
    if tape.device == "cpu" and watched_s > _NOTICED * ops_s:  # a device hides it, unless it waits itself
        notes.append(
            f"its {len(tape.ops)} ops take {ops_s / len(tape.ops) * 1e6:.0f} us each on average. To watch "
            f"one takes LMS some {_WATCHED_S * 1e6:.0f} us, {watched_s:.2g} s a step, which so short "
            "ops do not hide: that is not in the speeds"
        )
    parameter_bytes = _never_stepped_bytes(tape)
    if parameter_bytes > tape.resident_bytes:  # else what came later has been taken in
        notes.append(
            "no optimizer step was recorded, as where gradients accumulate over several passes: what the "
            "optimizer keeps, and gradients that wait from the pass before, may be missing from the bytes. "
            f"Parameters take {bytes_text(parameter_bytes)}, gradients as much again, AdamW's states twice "
            "as much"
        )
    if tape.ops and int(baseline_curve(tape).argmax()) in loading_ops(tape):
        notes.append(
            "the most memory is in use while data is loaded, between two steps: the step itself needs less"
        )
    if scale is None:
        return tuple(notes)
    if any(op.name == NAME for op in scale.large.ops):
        notes.append(
            "data loading ran other ops at one batch than at the other, so all that it did between two ops "
            "of the step counts as one op. What a loader takes ahead is as recorded"
        )
    if not kept_busy(scale):
        notes.append(
            f"the step hardly grew from batch {scale.small_batch} to {scale.large_batch}: the device was not "
            "kept busy, and times of larger batches are guesses. Record larger ones"
        )
    if outgrew_its_batch(scale):
        notes.append(
            f"the step took far more time at batch {scale.large_batch} than its size over batch "
            f"{scale.small_batch} explains: something else may have run beside it. Step times of "
            "other batches are guesses; record again, or other batches"
        )
    if evidence.batch_size > 4 * scale.large_batch:
        notes.append(
            f"batch {evidence.batch_size} is far from what was recorded ({scale.small_batch} and "
            f"{scale.large_batch}); nearer recordings predict better"
        )
    return tuple(notes)
