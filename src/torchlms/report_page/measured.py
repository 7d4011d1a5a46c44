"""Measured: the device's bytes at each op of a tape, as a profile of such a step has them."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchlms.core.tape import Tape
    from torchlms.report_page.profiled import Happened, Profiled

LEAST_MATCHED = 0.5  # of the ops of the tape, whose first step made the states of the optimizer besides
_NEAR = 400  # calls: an op that comes no sooner was not called


def measured_bytes(tape: Tape, profiled: Profiled, first_bytes: int) -> dict[int, int]:
    """The most that was allocated during each op, by its place on the tape: as far as the profile has such an
    op where the tape has it. Empty where the two do not match, or the profile has no memory.

    ``first_bytes`` is what there is at the first op, for a profile that counts from its own beginning.
    """
    if not profiled.allocated:
        return {}
    moments = [moment_s for moment_s, _ in profiled.allocated]
    found: dict[int, int] = {}
    for op, call in _matched(tape, profiled.calls):
        before = bisect_right(moments, call.start_s) - 1
        after = bisect_right(moments, call.start_s + call.seconds)
        sizes = [size_bytes for _, size_bytes in profiled.allocated[max(before, 0) : after]]
        if sizes:
            found[op] = max(sizes)
    if len(found) < LEAST_MATCHED * len(tape.ops):
        return {}
    shift = 0 if profiled.absolute else first_bytes - found[min(found)]
    return {op: size_bytes + shift for op, size_bytes in found.items()}


def _matched(tape: Tape, calls: tuple[Happened, ...]) -> Iterator[tuple[int, Happened]]:
    """Ops of the tape and the calls that they were, in the order of both. What LMS itself calls in between
    belongs to no op; what an op calls is within it."""
    at = 0
    for op, known in enumerate(tape.ops):
        name = "::".join(known.name.split(".")[:2])
        near = range(at, min(at + _NEAR, len(calls)))
        place = next((place for place in near if calls[place].name == name), None)
        if place is None:
            continue
        call = calls[place]
        yield op, call
        at = place + 1
        while at < len(calls) and calls[at].start_s < call.start_s + call.seconds:
            at += 1
