"""Held: a tape on which what the program itself still holds may leave, too.

Between two ops that touch it, a skip connection or a block's input lies as idle as what autograd alone
holds. It can be away if its storage is given back to the program in time, and emptied meanwhile. It cannot
be dropped, for what is made again comes in another storage.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchlms.core.tape import Stretch, Tape, Value


def with_held(tape: Tape) -> Tape:
    """``tape`` with the held stretches of its values among the idle ones. Where a value is held first and
    then idle without being touched in between, the two are one stretch."""
    if not any(value.held for value in tape.values):
        return tape
    return replace(tape, values=tuple(map(_freed, tape.values)))


def _freed(value: Value) -> Value:
    if not value.held:
        return value
    return replace(value, idle=_joined(value), held=(), movable=True, why_not="")


def _joined(value: Value) -> tuple[Stretch, ...]:
    *earlier, last = value.held
    if value.idle and last.stop == value.idle[0].start:
        first = replace(value.idle[0], start=last.start, held_until=last.stop)
        return (*earlier, first, *value.idle[1:])
    return (*value.held, *value.idle)
