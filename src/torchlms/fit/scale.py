"""Scale: the tape of any batch size, from the tapes of two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING

from torchlms.core.tape import Op, Tape
from torchlms.errors import BadOption, PlanMismatch
from torchlms.fit.loading import NAME, folded
from torchlms.fit.match import match

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchlms.core.tape import Value

_BLOCK_BYTES = 512  # the caching allocator's granularity


@dataclass(frozen=True, slots=True)
class Scale:
    """Two recordings of one step, and what each value of the larger is in the smaller.

    Assumed: bytes and seconds grow in a straight line with the batch. Sizes of tensors do; that the
    seconds do holds while the device is kept busy, for an op that waits to be launched takes as long
    at twice the batch. A library may choose another algorithm at another batch (cuDNN does), with
    another workspace and another speed; the two recordings cannot know. What differs between them
    beyond sizes, how long values live and lie idle, is taken from the larger.

    Tapes that part only in data loading have it folded (``fit/loading.py``). What no value describes and
    what waits in a loader may be less in the larger by chance: beyond it, that stays as it is there.
    """

    small: Tape
    large: Tape
    small_batch: int
    large_batch: int
    partners: tuple[int, ...]

    @staticmethod
    def of(small: Tape, large: Tape, small_batch: int, large_batch: int) -> Scale:
        """Either order; BadOption for batches that give no line, PlanMismatch for tapes that differ."""
        if small_batch < 1 or large_batch < 1:
            raise BadOption(f"batch sizes start at 1; got {small_batch} and {large_batch}")
        if small_batch == large_batch:
            raise BadOption(f"both recordings have batch size {small_batch}: a line needs two")
        if small_batch > large_batch:
            small, large, small_batch, large_batch = large, small, large_batch, small_batch
        small, large, partners = _matched(small, large)
        small_bytes, large_bytes = _bytes_in(small), _bytes_in(large)
        if large_bytes < small_bytes:
            raise BadOption(
                f"the recording of batch {large_batch} holds fewer bytes than that of batch {small_batch}: "
                "give each --batch in the order of its --tape"
            )
        if large_bytes == small_bytes:
            raise BadOption(
                f"the recording of batch {large_batch} holds as many bytes as that of batch {small_batch}: "
                "nothing can be told of others. Does make_batch heed options.batch_size? Is each --tape of "
                "the batch that was named for it?"
            )
        return Scale(small, large, small_batch, large_batch, partners)

    def at(self, batch: int) -> Tape:
        """The tape of one step at ``batch`` samples; at either recorded batch, with the recorded bytes."""
        if batch < 1:
            raise BadOption(f"a batch size is 1 or more, not {batch}")
        run = Fraction(batch - self.small_batch, self.large_batch - self.small_batch)
        return Tape(
            ops=tuple(self._ops(run)),
            values=tuple(self._values(run)),
            resident_bytes=_rising(self.small.resident_bytes, self.large.resident_bytes, run),
            device=self.large.device,
            torch=self.large.torch,
            model=self.large.model,
        )

    def _ops(self, run: Fraction) -> Iterator[Op]:
        times_s = self._times_s(float(run))
        for small, op, time_s in zip(self.small.ops, self.large.ops, times_s, strict=True):
            scratch_bytes = _line(small.scratch_bytes, op.scratch_bytes, run)
            yield Op(op.name, op.module, op.phase, time_s, op.reads, op.writes, scratch_bytes)

    def _values(self, run: Fraction) -> Iterator[Value]:
        for value, partner in zip(self.large.values, self.partners, strict=True):
            other = self.small.values[partner]
            line = _rising if value.op == NAME else _line
            size_bytes = line(other.size_bytes, value.size_bytes, run)
            yield replace(value, size_bytes=size_bytes, birth=min(value.birth, other.birth))

    def _times_s(self, run: float) -> list[float]:
        """Op times: each one's line through its two times, none falling, none below zero.

        Noise lets some lines fall. Those are made level, and to keep that from making the step longer
        the others rise less, so that the whole step stays on the line through the two steps.
        """
        pairs = [(op.time_s, other.time_s) for op, other in zip(self.small.ops, self.large.ops, strict=True)]
        rises_s = [max(0.0, large_s - small_s) for small_s, large_s in pairs]
        rise_s, risen_s = sum(large_s - small_s for small_s, large_s in pairs), sum(rises_s)
        damping = max(0.0, rise_s) / risen_s if risen_s else 0.0
        return [
            max(0.0, sum(pair) / 2 + damping * rise * (run - 0.5))
            for pair, rise in zip(pairs, rises_s, strict=True)
        ]


def extrapolate(small: Tape, large: Tape, small_batch: int, large_batch: int, batch: int) -> Tape:
    """The tape of ``batch``, from those of two other batch sizes; see ``Scale`` for what is assumed."""
    return Scale.of(small, large, small_batch, large_batch).at(batch)


def _matched(small: Tape, large: Tape) -> tuple[Tape, Tape, tuple[int, ...]]:
    """Both as they are where they match so, else with their data loading folded."""
    try:
        return small, large, match(small, large)
    except PlanMismatch:
        pair = folded(small, large)
        if pair is None:
            raise
    try:
        return *pair, match(*pair)
    except PlanMismatch as error:
        raise PlanMismatch(f"{error} (each run of data loading counts as one op)") from None


def _bytes_in(tape: Tape) -> int:
    return sum(value.size_bytes for value in tape.values)


def _rising(at_small: int, at_large: int, run: Fraction) -> int:
    """The line; where it falls, only down to the size in the larger."""
    line = _line(at_small, at_large, run)
    return max(line, at_large) if at_large < at_small else line


def _line(at_small: int, at_large: int, run: Fraction) -> int:
    """The line through two sizes; in whole blocks where both are, never below zero."""
    if at_small == at_large:
        return at_small
    block = 1 if at_small % _BLOCK_BYTES or at_large % _BLOCK_BYTES else _BLOCK_BYTES
    return max(0, ceil((at_small + (at_large - at_small) * run) / block) * block)
