"""Largest: the largest batch that fits in a budget, and the largest that keeps a share of the speed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchlms.core.bound import lower_bound
from torchlms.core.curve import smallest_budget
from torchlms.fit.outlook import NO_RULES, Outlook, Verdict, look

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.core.machine import Machine
    from torchlms.core.plan import Budget
    from torchlms.core.rules import Rules
    from torchlms.core.tape import Tape
    from torchlms.fit.scale import Scale

MOST = 1 << 20  # samples; a step that still fits then does not grow with its batch


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch size and what is predicted of it. ``speed`` is the share of the speed without a budget.

    ``at_least`` says that the search ended here for no other reason than that it tries no larger batch.
    """

    batch_size: int
    step_s: float
    samples_per_s: float
    speed: float
    bytes_out: int
    at_least: bool = False


@dataclass(slots=True)
class Batches:
    """All batch sizes of one step under one budget; each is looked at once.

    What a batch needs is taken to grow with it. Where a batch is found, the next larger one does not
    do; predictions come from a search, so that a still larger one might, by luck, keep a share again.
    """

    scale: Scale
    machine: Machine
    budget: Budget
    rules: Rules = NO_RULES
    _tapes: dict[int, Tape] = field(default_factory=dict)
    _looks: dict[int, Outlook] = field(default_factory=dict)

    def outlook(self, batch: int) -> Outlook:
        """What is predicted of ``batch``."""
        if batch not in self._looks:
            self._looks[batch] = look(self._tape(batch), self.machine, self.budget, self.rules)
        return self._looks[batch]

    def largest(self) -> Batch | None:
        """The largest batch that fits at all; None if a single sample does not."""
        on_device = last(lambda batch: smallest_budget(self._tape(batch)) <= self.budget.device_bytes)
        if on_device == 0 or self.outlook(on_device).works:
            return self._batch(on_device)
        return self._batch(last(lambda batch: self.outlook(batch).works, most=on_device))

    def keeping(self, share: float) -> Batch | None:
        """The largest batch that keeps ``share`` of the speed it would have without a budget."""
        largest = self.largest()
        if largest is None:
            return None
        return self._batch(last(lambda batch: self._keeps(batch, share), most=largest.batch_size))

    def unmoved(self) -> Batch | None:
        """The largest batch for which nothing has to move."""
        largest = self.largest()
        if largest is None:
            return None
        return self._batch(
            last(lambda batch: self.outlook(batch).verdict is Verdict.FITS, most=largest.batch_size)
        )

    def _keeps(self, batch: int, share: float) -> bool:
        if batch not in self._looks:
            # Far cheaper than a plan, and often enough to say no.
            tape = self._tape(batch)
            plain_s = sum(op.time_s for op in tape.ops)
            recompute = self.rules.recompute
            if plain_s < share * lower_bound(tape, self.machine, self.budget, recompute=recompute):
                return False
        return self.outlook(batch).speed >= share

    def _tape(self, batch: int) -> Tape:
        if batch not in self._tapes:
            self._tapes[batch] = self.scale.at(batch)
        return self._tapes[batch]

    def _batch(self, batch: int) -> Batch | None:
        if batch == 0:
            return None
        outlook = self.outlook(batch)
        if outlook.predicted is None:
            return None
        step_s = outlook.predicted.step_s
        return Batch(
            batch_size=batch,
            step_s=step_s,
            samples_per_s=batch / step_s if step_s > 0 else 0.0,
            speed=outlook.speed,
            bytes_out=outlook.predicted.bytes_out,
            at_least=batch >= MOST,
        )


def last(works: Callable[[int], bool], *, most: int = MOST) -> int:
    """The last number up to ``most`` that works, if all before it do: it works, and the next does not.

    0 if 1 does not work. Doubles, then halves the gap.
    """
    low, high = 0, 1
    while high <= most and works(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low
