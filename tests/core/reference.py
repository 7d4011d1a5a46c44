"""A second simulator, slow and obvious: one clock, everything that is under way, exact fractions.

Where torchlms.core.simulate asks its queues for the end of a copy, this one holds the state of every
resource at the present instant and moves on to the next thing that ends.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from torchlms.core.plan import Choice, Decision

if TYPE_CHECKING:
    from torchlms.core.machine import Machine
    from torchlms.core.tape import Tape


def step_seconds(tape: Tape, machine: Machine, decisions: tuple[Decision, ...], *, laps: int) -> Fraction:
    """Length of the last of ``laps`` steps."""
    ends: list[Fraction] = []
    world = _World(tape, machine, decisions)
    program = _program(tape, decisions)
    for _ in range(laps):
        for instruction in program:
            world.do(*instruction)
        ends.append(world.now)
    return ends[-1] - (ends[-2] if laps > 1 else 0)


def memory(tape: Tape, decisions: tuple[Decision, ...]) -> list[int]:
    """Bytes at each op, straight from the definition."""
    curve = []
    for index, op in enumerate(tape.ops):
        total = tape.resident_bytes + op.scratch_bytes
        for value in tape.values:
            away = any(_absent(decision, index) for decision in decisions if decision.value == value.id)
            if value.birth <= index <= value.death and not away:
                total += value.size_bytes
        curve.append(total)
    return curve


def _absent(decision: Decision, op: int) -> bool:
    release, reload = decision.release_op, decision.reload_op
    if release < reload:
        return release <= op < reload
    return op >= release or op < reload


def _program(tape: Tape, decisions: tuple[Decision, ...]) -> list[tuple[str, int]]:
    """What the compute queue does in one step, in order; numbers are decisions or ops."""
    count = len(tape.ops)

    def spans(decision: Decision) -> tuple[int, int]:
        stretch = tape.values[decision.value].idle[decision.stretch]
        return stretch.start, stretch.stop

    def urgency(index: int, moment: int) -> tuple[int, int]:
        return (spans(decisions[index])[1] - moment) % (count + 1), decisions[index].value

    program: list[tuple[str, int]] = []
    for moment in range(count + 1):
        numbers = sorted(range(len(decisions)), key=lambda index: decisions[index].value)
        program += [("out", index) for index in numbers if spans(decisions[index])[0] == moment]
        program += [("await out", index) for index in numbers if decisions[index].release_op == moment]
        back = [index for index in numbers if decisions[index].reload_op == moment]
        ahead = [index for index in back if spans(decisions[index])[1] >= moment]
        behind = [index for index in back if spans(decisions[index])[1] < moment]
        for group in (ahead, behind):
            group.sort(key=lambda index: (spans(decisions[index])[1], decisions[index].value))
            program += [("in", index) for index in group]
        program += [("await in", index) for index in numbers if spans(decisions[index])[1] == moment]
        if moment < count:
            program.append(("run", moment))
    return program


class _World:
    """Lists of [decision, seconds of work left]; the first of each list is the one under way."""

    def __init__(self, tape: Tape, machine: Machine, decisions: tuple[Decision, ...]) -> None:
        self.now = Fraction(0)
        self._tape, self._machine, self._decisions = tape, machine, decisions
        self._out: list[list[Fraction]] = []
        self._in: list[list[Fraction]] = []
        self._write: list[list[Fraction]] = []
        self._read: list[list[Fraction]] = []
        self._is_out = [True] * len(decisions)
        self._is_in = [True] * len(decisions)

    def do(self, what: str, number: int) -> None:
        if what == "run":
            self._pass(Fraction(self._tape.ops[number].time_s))
        elif what == "out":
            self._is_out[number] = False
            self._start_out(number)
        elif what == "in":
            while not self._is_out[number]:
                self._pass(None)
            self._is_in[number] = False
            self._start_in(number)
        elif what == "await out":
            while not self._is_out[number]:
                self._pass(None)
        else:
            while not self._is_in[number]:
                self._pass(None)

    def _size(self, number: int) -> int:
        return self._tape.values[self._decisions[number].value].size_bytes

    def _disk(self, number: int) -> bool:
        return self._decisions[number].choice is Choice.DISK

    def _start_out(self, number: int) -> None:
        if self._machine.link:
            self._out.append([Fraction(number), Fraction(self._machine.out_s(self._size(number)))])
        else:
            self._start_write(number)

    def _start_write(self, number: int) -> None:
        self._write.append([Fraction(number), Fraction(self._machine.disk_write_s(self._size(number)))])

    def _start_in(self, number: int) -> None:
        if self._disk(number):
            self._read.append([Fraction(number), Fraction(self._machine.disk_read_s(self._size(number)))])
        else:
            self._start_back(number)

    def _start_back(self, number: int) -> None:
        if self._machine.link:
            self._in.append([Fraction(number), Fraction(self._machine.in_s(self._size(number)))])
        else:
            self._is_in[number] = True

    def _pass(self, seconds: Fraction | None) -> None:
        """Let ``seconds`` go by, or (None) let time go by until something ends."""
        left = seconds
        while left is None or left > 0:
            both = bool(self._out and self._in)
            rates = [
                (self._out, Fraction(self._machine.out_share) if both else Fraction(1)),
                (self._in, Fraction(self._machine.in_share) if both else Fraction(1)),
                (self._write, Fraction(1)),
                (self._read, Fraction(1)),
            ]
            steps = [queue[0][1] / rate for queue, rate in rates if queue]
            step = min(steps + ([left] if left is not None else []))
            self.now += step
            for queue, rate in rates:
                if queue:
                    queue[0][1] -= step * rate
            ended = self._collect()
            if left is None:
                if ended:
                    return
            else:
                left -= step

    def _collect(self) -> bool:
        ended = False
        if self._out and self._out[0][1] <= 0:
            number, ended = int(self._out.pop(0)[0]), True
            if self._disk(number):
                self._start_write(number)
            else:
                self._is_out[number] = True
        if self._in and self._in[0][1] <= 0:
            self._is_in[int(self._in.pop(0)[0])], ended = True, True
        if self._write and self._write[0][1] <= 0:
            self._is_out[int(self._write.pop(0)[0])], ended = True, True
        if self._read and self._read[0][1] <= 0:
            number, ended = int(self._read.pop(0)[0]), True
            self._start_back(number)
        return ended
