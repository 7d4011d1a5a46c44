"""Timer: how long each op takes while nothing else slows the program down.

A recorded step spends more time on watching than the device spends on computing, so its op times
are mostly those of launching. Steps under a plan run ahead of the device again; two marks per op
are then all that is added, and what the compute queue waits for copies lies between the marks.

Where the device has all but caught up with the program (a slow host; the allocator waited for the device),
an op's two marks would be as far apart as the program takes from one to the other. So before the next
op the device is kept busy for a moment, in which the program gets ahead of it again.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torchlms.core.tape import Op, Phase, Tape
from torchlms.eager import private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torchlms.memory.device import CpuDevice, CudaDevice, Mark

_BARE_MARKS = 9  # with nothing between them
_NOTHING = 1.25  # times as far apart as bare marks are, more or less
_FEW_OPS = 8
_USES = 8  # saved tensors between two looks at the device
_STARVED = 0.5  # of the looks
_HEAD_START_S = 2e-3  # in which the program does some dozens of ops


class Lap:
    """From the first saved tensor of a micro-step to the end of its backward pass, on the compute queue."""

    def __init__(self, device: CudaDevice | CpuDevice) -> None:
        self._device = device
        self._begin = self._before = device.mark()
        self._end: Mark | None = None
        self._uses = self._looks = self._idle = 0
        self.values_s = 0.0  # that the program spent on values that leave
        self.again_s = 0.0  # and on the histories of those that are made again

    def end(self) -> None:
        self._end = self._device.mark()

    def note_use(self) -> None:
        """A tensor is saved or asked for: now and then, see how far behind the program the device is."""
        self._uses += 1
        if self._uses % _USES == 0 and self._device.is_cuda:
            self._looks += 1
            self._idle += self._before.passed()
            self._before = self._device.mark()

    @property
    def starved(self) -> bool:
        """Whether the device had mostly done what the program gave it a few saved tensors ago."""
        return self._idle > _STARVED * self._looks

    @property
    def passed(self) -> bool:
        """Whether the device is past it, so that nobody has to wait to know how long it took."""
        return self._end is None or self._end.passed()

    @property
    def seconds(self) -> float | None:
        """None if backward never ended; waits until the device is past it, and no longer."""
        if self._end is None:
            return None
        self._end.wait()
        return self._end.since_s(self._begin)


class OpTimer:
    """Marks around every op of one micro-step."""

    def __init__(self, device: CudaDevice | CpuDevice) -> None:
        self._device = device
        self._begin: Mark | None = None
        self._marks: list[tuple[Any, Mark, Mark]] = []

    def begin(self) -> None:
        """An op is about to be tried, perhaps not for the first time: what came before does not count."""
        if self._device.is_cuda and self._caught_up():
            private.keep_busy(self._device.torch_device, _HEAD_START_S)
        self._begin = self._device.mark()

    def _caught_up(self) -> bool:
        """Whether the device is only a few ops behind the program, or nothing is known of that yet."""
        if len(self._marks) < _FEW_OPS:
            return not self._marks
        return self._marks[-_FEW_OPS][2].passed()

    def end(self, func: Any) -> None:
        assert self._begin is not None
        self._marks.append((func, self._begin, self._device.mark()))

    def times(self) -> list[tuple[str, float]]:
        """Name and seconds of each op, in order; waits for the device. What leaves nothing between its marks
        takes no time; what does is launched as far from its neighbours without marks as with them."""
        bare: list[Mark] = [self._device.mark() for _ in range(_BARE_MARKS)]
        self._device.synchronize()
        apart_s = min(later.since_s(earlier) for earlier, later in pairwise(bare))
        times_s = [(func, end.since_s(begin)) for func, begin, end in self._marks]
        return [(str(func), time_s if time_s > _NOTHING * apart_s else 0.0) for func, time_s in times_s]


def retimed(
    tape: Tape, runs: list[list[tuple[str, float]]], usual: Callable[[Iterable[float]], float] = min
) -> Tape:
    """``tape`` with each op's ``usual`` time over ``runs``, as far as the ops are the same.

    What follows the backward pass may differ from the recorded step (an optimizer's first step
    makes its states); its total time is then spread over the ops on the tape.
    """
    inner = sum(1 for op in tape.ops if op.phase is not Phase.BETWEEN)
    names = [op.name for op in tape.ops]
    alike = [run for run in runs if [name for name, _ in run[:inner]] == names[:inner]]
    if not alike:
        return tape
    ops = [_with_time(op, usual(run[index][1] for run in alike)) for index, op in enumerate(tape.ops[:inner])]
    outer = tape.ops[inner:]
    if outer:
        total_s = usual(sum(seconds for _, seconds in run[inner:]) for run in alike)
        ops.extend(_with_time(op, total_s / len(outer)) for op in outer)
    return replace(tape, ops=tuple(ops))


def evened(tape: Tape) -> Tape:
    """``tape`` with the shortest time of any op of that name and those sizes for each: what a step that is
    recorded adds to an op, a kernel's first use or an eviction, it does not add to all of its like."""
    kinds = [(op.name, _bytes_of(tape, op.reads), _bytes_of(tape, op.writes)) for op in tape.ops]
    shortest_s: dict[tuple[str, int, int], float] = {}
    for op, kind in zip(tape.ops, kinds, strict=True):
        shortest_s[kind] = min(op.time_s, shortest_s.get(kind, op.time_s))
    ops = (_with_time(op, shortest_s[kind]) for op, kind in zip(tape.ops, kinds, strict=True))
    return replace(tape, ops=tuple(ops))


def _bytes_of(tape: Tape, values: Iterable[int]) -> int:
    return sum(tape.values[value].size_bytes for value in values)


def _with_time(op: Op, time_s: float) -> Op:
    return replace(op, time_s=time_s)
