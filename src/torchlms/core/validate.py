"""Validate: is this plan legal for this tape? A named reason for each thing that is not.

Written apart from the planner and the simulator, and sharing nothing with them but the records: plain
loops over the definitions, so that a mistake would have to be made twice.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from torchlms.core.plan import Choice, Decision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torchlms.core.machine import Machine
    from torchlms.core.plan import Plan
    from torchlms.core.tape import Stretch, Tape, Value

__all__ = ["IMPOSSIBLE", "Fault", "Reason", "validate"]

ALIGN_BYTES = {Choice.HOST: 512, Choice.DISK: 4096}


class Reason(str, Enum):
    """Why a plan is refused."""

    WRONG_TAPE = "made for another tape"
    WRONG_TORCH = "made with another torch"
    WRONG_DEVICE = "made for another kind of device"
    UNKNOWN_VALUE = "no such value"
    UNKNOWN_STRETCH = "no such idle stretch"
    DECIDED_TWICE = "two decisions for one stretch"
    NOT_MOVABLE = "the value cannot be moved"
    NO_RECIPE = "the value cannot be made again"
    STILL_HELD = "dropped while the program holds it"
    SOURCE_AWAY = "made again while what it is made from is away"
    NO_LINK = "no host memory apart from the device"
    RELEASE_EARLY = "released before the stretch begins"
    RELEASE_LATE = "released at or after its reload"
    RELOAD_LATE = "reloaded after it is needed"
    MISALIGNED = "offset not aligned"
    OVERLAP = "shares bytes with another value at the same time"
    OVER_DEVICE = "more device memory than the budget"
    OVER_HOST = "more host memory than the budget"
    OVER_DISK = "more disk than the budget"


# A plan with one of these cannot be carried out. With others it can, as far as this step allows: what
# cannot be moved or made again in it stays, and what finds no room waits elsewhere.
IMPOSSIBLE = frozenset({
    Reason.UNKNOWN_VALUE, Reason.UNKNOWN_STRETCH, Reason.DECIDED_TWICE, Reason.RELEASE_EARLY,
    Reason.RELEASE_LATE, Reason.RELOAD_LATE, Reason.MISALIGNED, Reason.OVERLAP,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong; ``decision`` is its position in the plan, -1 for the plan as a whole."""

    reason: Reason
    detail: str
    decision: int = -1

    def __str__(self) -> str:
        where = f"decision {self.decision}: " if self.decision >= 0 else ""
        return f"{where}{self.reason.value} ({self.detail})"


def validate(tape: Tape, plan: Plan, machine: Machine | None = None) -> list[Fault]:
    """Everything that is wrong with ``plan``; empty when it is legal.

    Without a machine, a device whose name begins with "cpu" is taken to have no link. Overlap is
    judged conservatively: a value holds its place from the first to the last moment of its stretch, or until
    something is made from it again after it has come back, whenever its copies really run. Whether the plan
    is any good is not judged.
    """
    faults = list(_whole(tape, plan))
    sound: list[tuple[int, Decision]] = []
    seen: set[tuple[int, int]] = set()
    has_link = bool(machine.link) if machine is not None else not plan.device.startswith("cpu")
    for index, decision in enumerate(plan.decisions):
        found = _one(tape, decision, has_link)
        if (decision.value, decision.stretch) in seen:
            found = (Reason.DECIDED_TWICE, f"value {decision.value}, stretch {decision.stretch}")
        seen.add((decision.value, decision.stretch))
        if found:
            faults.append(Fault(*found, index))
        elif decision.choice is not Choice.KEEP:
            sound.append((index, decision))
    makings = _makings(tape, sound)
    asked = _asked(sound, makings)
    faults += _sources(sound, makings)
    faults += _places(tape, sound, asked)
    faults += _device(tape, plan, sound, makings, asked)
    faults += _tiers(tape, plan, sound, has_link)
    return faults


Found = tuple[Reason, str]


def _whole(tape: Tape, plan: Plan) -> Iterator[Fault]:
    if plan.fingerprint != tape.fingerprint:
        yield Fault(Reason.WRONG_TAPE, f"plan {plan.fingerprint!r}, tape {tape.fingerprint!r}")
    if plan.torch != tape.torch:
        yield Fault(Reason.WRONG_TORCH, f"plan {plan.torch!r}, tape {tape.torch!r}")
    if plan.device.partition(":")[0] != tape.device.partition(":")[0]:
        yield Fault(Reason.WRONG_DEVICE, f"plan {plan.device!r}, tape {tape.device!r}")


def _one(tape: Tape, decision: Decision, has_link: bool) -> Found | None:
    """What is wrong with one decision by itself: the first thing found."""
    if not 0 <= decision.value < len(tape.values):
        return Reason.UNKNOWN_VALUE, f"value {decision.value} of {len(tape.values)}"
    value = tape.values[decision.value]
    if not 0 <= decision.stretch < len(value.idle):
        return (
            Reason.UNKNOWN_STRETCH,
            f"stretch {decision.stretch} of value {value.id}, which has {len(value.idle)}",
        )
    if decision.choice is Choice.KEEP:
        return None
    if decision.choice is Choice.RECOMPUTE:
        if not value.recipe:
            return Reason.NO_RECIPE, f"value {value.id}, made by {value.op or value.kind.value}"
        stretch = value.idle[decision.stretch]
        if stretch.held_until is not None and decision.release_op < stretch.held_until:
            return Reason.STILL_HELD, f"value {value.id}, by the program until op {stretch.held_until}"
        return _times(decision, stretch, len(tape.ops))
    if not value.movable:
        return Reason.NOT_MOVABLE, f"value {value.id}: {value.why_not or 'not marked movable'}"
    if decision.choice is Choice.HOST and not has_link:
        return Reason.NO_LINK, f"value {value.id} is to go to host memory"
    return _times(decision, value.idle[decision.stretch], len(tape.ops)) or _alignment(decision)


def _times(decision: Decision, stretch: Stretch, count: int) -> Found | None:
    """All three moments are counted in ops since the stretch began, around the end if it wraps."""
    release, reload, stop = decision.release_op, decision.reload_op, stretch.stop
    said = f"stretch {stretch.start} to {stop}, release {release}, reload {reload}"
    if release < 0 or release > count:
        return Reason.RELEASE_EARLY, said
    if reload < 0 or reload > count:
        return Reason.RELOAD_LATE, said
    wraps = stop <= stretch.start
    if wraps:
        stop += count
        release += count if release < stretch.start else 0
        reload += count if reload < stretch.start else 0
    if release < stretch.start or (wraps and release > stop):
        return Reason.RELEASE_EARLY, said
    if reload > stop:
        return Reason.RELOAD_LATE, said
    if release >= reload:
        return Reason.RELEASE_LATE, said
    return None


def _alignment(decision: Decision) -> Found | None:
    align_bytes = ALIGN_BYTES[decision.choice]
    if decision.offset_bytes < 0 or decision.offset_bytes % align_bytes:
        return (
            Reason.MISALIGNED,
            f"{decision.choice.value} offset {decision.offset_bytes}, unit {align_bytes}",
        )
    return None


Making = tuple[list[int], set[int]]  # values made in passing, in this order, and those that must be there


def _makings(tape: Tape, sound: list[tuple[int, Decision]]) -> dict[int, Making]:
    """How each decision to drop has its value made again: a source that is made in passing, and away then, is
    made first, from what it is made from."""
    away = _by_value(sound)
    makings: dict[int, Making] = {}
    for index, decision in sound:
        if decision.choice is not Choice.RECOMPUTE:
            continue
        before: list[int] = []
        there: set[int] = set()
        waiting = [(decision.value, False)]
        met: set[int] = set()
        while waiting:
            value, ready = waiting.pop()
            others = away.get(value, ())
            if ready:
                before.append(value)
            elif value not in met:
                met.add(value)
                if value == decision.value or any(
                    other.passing and _away(other, decision.reload_op) for other in others
                ):
                    waiting.append((value, True))
                    sources = sorted(
                        tape.values[value].sources, key=lambda source: -tape.values[source].birth
                    )
                    waiting.extend((source, False) for source in sources)
                else:
                    there.add(value)
        makings[index] = (before[:-1], there)  # the last is the value itself
    return makings


def _asked(sound: list[tuple[int, Decision]], makings: dict[int, Making]) -> dict[int, list[int]]:
    """Before which ops something is made from a value, by its id."""
    asked: dict[int, list[int]] = {}
    for index, decision in sound:
        for source in makings[index][1] if index in makings else ():
            asked.setdefault(source, []).append(decision.reload_op)
    return asked


def _by_value(sound: list[tuple[int, Decision]]) -> dict[int, list[Decision]]:
    found: dict[int, list[Decision]] = {}
    for _, decision in sound:
        found.setdefault(decision.value, []).append(decision)
    return found


def _away(decision: Decision, op: int) -> bool:
    return decision.release_op <= op < decision.reload_op


def _sources(sound: list[tuple[int, Decision]], makings: dict[int, Making]) -> Iterator[Fault]:
    """What a value is made from must be on the device, or come back there, before the same op."""
    away = _by_value(sound)
    for index, decision in sound:
        for source in makings[index][1] if index in makings else ():
            for other in away.get(source, ()):
                if _away(other, decision.reload_op):
                    yield Fault(
                        Reason.SOURCE_AWAY,
                        f"value {decision.value} before op {decision.reload_op}, its source {source} is back "
                        f"before op {other.reload_op}",
                        index,
                    )


def _places(tape: Tape, sound: list[tuple[int, Decision]], asked: dict[int, list[int]]) -> Iterator[Fault]:
    """Sweep over the moments with what lies in a tier sorted by offset: a newcomer meets only neighbours."""
    for choice in ALIGN_BYTES:
        lying: list[tuple[int, int, int]] = []  # offset, end, decision
        for _, arrives, index, decision in sorted(
            _comings_and_goings(tape, sound, choice, asked), key=_by_moment
        ):
            offset = decision.offset_bytes
            entry = (offset, offset + tape.values[decision.value].size_bytes, index)
            place = bisect_left(lying, entry)
            if not arrives:
                if place < len(lying) and lying[place] == entry:
                    lying.pop(place)
                continue
            meets = [other for other in lying[max(0, place - 1) : place + 1] if _share(entry, other)]
            if meets:
                yield Fault(Reason.OVERLAP, f"with decision {meets[0][2]} in {choice.value}", index)
            else:
                insort(lying, entry)


Event = tuple[int, bool, int, Decision]


def _comings_and_goings(
    tape: Tape, sound: list[tuple[int, Decision]], choice: Choice, asked: dict[int, list[int]]
) -> Iterator[Event]:
    for index, decision in sound:
        if decision.choice is choice:
            stretch = tape.values[decision.value].idle[decision.stretch]
            if stretch.start < stretch.stop:
                uses = [op for op in asked.get(decision.value, ()) if decision.reload_op <= op < stretch.stop]
                stretch = replace(stretch, stop=min([*uses, stretch.stop]))
            for first, last in _spans(stretch, len(tape.ops)):
                yield first, True, index, decision
                yield last + 1, False, index, decision


def _by_moment(event: Event) -> tuple[int, bool, int]:
    return event[:3]


def _spans(stretch: Stretch, count: int) -> list[tuple[int, int]]:
    """First and last moments; two spans when the stretch wraps."""
    if stretch.start < stretch.stop:
        return [(stretch.start, stretch.stop)]
    if stretch.start == stretch.stop:
        return [(0, count)]
    return [(0, stretch.stop), (stretch.start, count)]


def _share(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _replaying(tape: Tape, value: Value, before: Sequence[int]) -> int:
    """The most bytes that it takes at once to make ``value`` again, besides it and its sources: each of
    ``before`` is made first, and there until the end."""
    held = worst = 0
    for source in before:
        worst = max(worst, held + _between(tape, tape.values[source], counted=True))
        held += tape.values[source].size_bytes
    return max(worst, held + _between(tape, value, counted=False))


def _between(tape: Tape, value: Value, *, counted: bool) -> int:
    """The most bytes that a recipe needs at once, besides its sources, and besides ``value`` that it makes
    unless that is ``counted``."""
    between = [other for other in tape.values if other.birth in value.recipe and other.id != value.id]
    worst = 0
    for index, op in enumerate(value.recipe):
        to_come = {
            used
            for later in value.recipe[index:]
            for used in (*tape.ops[later].reads, *tape.ops[later].writes)
        }
        there = [
            other for other in between if other.birth == op or (other.birth < op and other.id in to_come)
        ]
        itself = value.size_bytes if counted and value.birth <= op else 0
        worst = max(worst, itself + sum(other.size_bytes for other in there) + tape.ops[op].scratch_bytes)
    return worst


def _device(
    tape: Tape,
    plan: Plan,
    sound: list[tuple[int, Decision]],
    makings: dict[int, Making],
    asked: dict[int, list[int]],
) -> Iterator[Fault]:
    count = len(tape.ops)
    changes = [0] * (count + 1)

    def add(first: int, end: int, size_bytes: int) -> None:
        changes[max(first, 0)] += size_bytes
        changes[min(end, count)] -= size_bytes

    for value in tape.values:
        add(value.birth, value.death + 1, value.size_bytes)
    for _, decision in sound:
        size_bytes = tape.values[decision.value].size_bytes
        if decision.release_op < decision.reload_op:
            add(decision.release_op, decision.reload_op, -size_bytes)
        else:
            add(decision.release_op, count, -size_bytes)
            add(0, decision.reload_op, -size_bytes)
    scratch = [op.scratch_bytes for op in tape.ops]
    for index, decision in sound:
        back = decision.reload_op
        if decision.choice is Choice.RECOMPUTE and back < count:
            before, _ = makings[index]
            # Before the op that asks has any results.
            results = sum(other.size_bytes for other in tape.values if other.birth == back)
            replaying = _replaying(tape, tape.values[decision.value], before)
            scratch[back] = max(scratch[back], replaying - results)
    for source, uses in asked.items():
        value, last = tape.values[source], max(uses)
        if last > value.death:
            add(value.death + 1, last + 1, value.size_bytes)
    used = tape.resident_bytes
    worst = (plan.budget.device_bytes, -1)
    for index in range(count):
        used += changes[index]
        worst = max(worst, (used + scratch[index], index), key=lambda pair: pair[0])
    if worst[1] >= 0:
        yield Fault(
            Reason.OVER_DEVICE, f"{worst[0]} bytes at op {worst[1]}, budget {plan.budget.device_bytes}"
        )


def _tiers(tape: Tape, plan: Plan, sound: list[tuple[int, Decision]], has_link: bool) -> Iterator[Fault]:
    """The highest byte in each tier. With a link, disk values pass through host memory: twice the largest."""

    def highest(choice: Choice, byte_of: Callable[[int, int], int]) -> int:
        return max(
            (
                byte_of(decision.offset_bytes, tape.values[decision.value].size_bytes)
                for _, decision in sound
                if decision.choice is choice
            ),
            default=0,
        )

    host_bytes = highest(Choice.HOST, lambda offset, size: offset + size)
    disk_bytes = highest(Choice.DISK, lambda offset, size: offset + size)
    staging_bytes = 2 * highest(Choice.DISK, lambda _, size: size) if has_link else 0
    if host_bytes + staging_bytes > plan.budget.host_bytes and (host_bytes or staging_bytes):
        detail = f"{host_bytes} bytes and {staging_bytes} of staging, budget {plan.budget.host_bytes}"
        yield Fault(Reason.OVER_HOST, detail)
    if disk_bytes > plan.budget.disk_bytes:
        yield Fault(Reason.OVER_DISK, f"{disk_bytes} bytes, budget {plan.budget.disk_bytes}")
