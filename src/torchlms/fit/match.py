"""Match: which value of one tape is which of another, when both are the same step at two batch sizes."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from torchlms.core.tape import Kind, Phase
from torchlms.errors import PlanMismatch

if TYPE_CHECKING:
    from torchlms.core.tape import Op, Tape, Value

# What is saved below this size is kept by autograd itself and not counted among the saved values, so at
# a small batch a value can be missing there that is present at a larger one.
UNCOUNTED_BYTES = 512
# A recording knows that the backward pass has begun when a saved value comes back. Where the first of them
# are not counted at the smaller batch, the first ops of its backward pass pass for ops of the forward pass.
_PASSES = {Phase.FORWARD, Phase.BACKWARD}


def match(small: Tape, large: Tape) -> tuple[int, ...]:
    """The id in ``small`` of each value of ``large``, by id.

    Checks that both tapes have the same ops in the same order, that these read and write corresponding
    values, born at the same ops, and that autograd saved corresponding values in the same order.
    PlanMismatch says at which op they part. How long values live and lie idle is not compared.
    """
    if small.device != large.device or small.torch != large.torch:
        raise PlanMismatch(
            f"the tapes come from different places: {small.device} with torch {small.torch}, and "
            f"{large.device} with torch {large.torch}; record both on one machine"
        )
    partners = _partners(small, large)
    for ours, theirs in partners.items():
        _check_value(small.values[theirs], large.values[ours])
    _check_saved(small, large, partners)
    return tuple(partners[value.id] for value in large.values)


def _partners(small: Tape, large: Tape) -> dict[int, int]:
    """By walking along both: ids depend on who was met first, positions in ops do not."""
    there: dict[int, int] = {}
    back: dict[int, int] = {}
    for index, (first, second) in enumerate(zip_longest(small.ops, large.ops)):
        if first is None or second is None or not _alike(first, second):
            raise _parted(index, first, second)
        for theirs, ours in zip(first.reads + first.writes, second.reads + second.writes, strict=True):
            if there.setdefault(ours, theirs) != theirs or back.setdefault(theirs, ours) != ours:
                raise _parted(index, first, second, why="reads or writes other values")
    rest = [value.id for value in large.values if value.id not in there]
    their_rest = [value.id for value in small.values if value.id not in back]
    if len(rest) != len(their_rest):
        raise PlanMismatch(
            f"the tapes are not the same step: one has {len(their_rest)} values that no op touches, "
            f"the other {len(rest)}"
        )
    return there | dict(zip(rest, their_rest, strict=True))


def _alike(first: Op, second: Op) -> bool:
    return (
        first.name == second.name
        and (first.phase is second.phase or {first.phase, second.phase} == _PASSES)
        and len(first.reads) == len(second.reads)
        and len(first.writes) == len(second.writes)
    )


def _check_value(small: Value, large: Value) -> None:
    # An input comes from outside of the step, and when it came may be chance: a loader takes ahead.
    if small.kind != large.kind or (small.birth != large.birth and large.kind is not Kind.INPUT):
        raise PlanMismatch(
            f"the tapes are not the same step: the {large.kind.value} made by op {large.birth} "
            f"({large.op or 'before the step'}) is a {small.kind.value} of op {small.birth} in the other"
        )


def _check_saved(small: Tape, large: Tape, partners: dict[int, int]) -> None:
    before = -1
    for value in sorted((value for value in large.values if value.saved >= 0), key=lambda item: item.saved):
        other = small.values[partners[value.id]]
        if other.saved < 0 and other.size_bytes <= UNCOUNTED_BYTES:
            continue
        if other.saved <= before:
            raise _saved_otherwise(value)
        before = other.saved
    for ours, theirs in partners.items():
        value = large.values[ours]
        if small.values[theirs].saved >= 0 and value.saved < 0 and value.size_bytes > UNCOUNTED_BYTES:
            raise _saved_otherwise(value)


def _saved_otherwise(value: Value) -> PlanMismatch:
    return PlanMismatch(
        f"the tapes are not the same step: the result of op {value.birth} ({value.op or 'an input'} in "
        f"{value.module or 'no module'}) is saved for the backward pass in another order, or in one only"
    )


def _parted(index: int, first: Op | None, second: Op | None, why: str = "") -> PlanMismatch:
    names = [_described(op) for op in (first, second)]
    return PlanMismatch(
        f"the tapes part at op {index}: {names[0]} in one, {names[1]} in the other"
        f"{f', which {why}' if why else ''}; record the same model at two larger batch sizes"
    )


def _described(op: Op | None) -> str:
    if op is None:
        return "the end"
    reads, writes = len(op.reads), len(op.writes)
    return f"{op.name} ({op.phase.value}, {op.module or 'no module'}, {reads} read, {writes} written)"
