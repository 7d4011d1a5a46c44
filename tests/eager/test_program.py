"""Program, routine and timer: a plan in the order in which it is followed, and what becomes of it."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchlms.core.plan import Budget, Choice, Decision, Plan, Prediction
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value
from torchlms.eager import private
from torchlms.eager.program import Deed, Program
from torchlms.eager.routine import MOST_RECORDINGS, STRAYS, Routine, Signature, Verdict
from torchlms.eager.timer import Lap, OpTimer, evened, retimed
from torchlms.memory.device import CpuDevice
from torchlms.memory.ledger import Ledger


def op(name: str, phase: Phase = Phase.FORWARD, time_s: float = 1.0) -> Op:
    return Op(name, "layer", phase, time_s, (), ())


def value(index: int, saved: int, start: int, stop: int, size_bytes: int = 1000) -> Value:
    return Value(
        id=index,
        kind=Kind.ACTIVATION,
        size_bytes=size_bytes,
        birth=start - 1,
        death=stop,
        idle=(Stretch(start, stop),) if stop > start else (),
        saved=saved,
        saved_at=start - 1,
        movable=stop > start,
    )


OPS = (
    *(op(f"forward{index}") for index in range(4)),
    *(op(f"backward{index}", Phase.BACKWARD) for index in range(4)),
    *(op(f"between{index}", Phase.BETWEEN) for index in range(2)),
)
# Saved in another order than made; the last one was never asked for.
TAPE = Tape(OPS, (value(0, 1, 1, 7), value(1, 0, 2, 6, 500), value(2, 2, 3, 0)), 0, "cpu", "2.13")


def plan_of(*decisions: Decision) -> Plan:
    return Plan("f", "2.13", "cpu", Budget(1, 1, 1), decisions, Prediction(0, 0, 0.0, 0.0, 0.0))


def test_actions_in_the_order_of_their_ops() -> None:
    program = Program(
        TAPE,
        plan_of(
            Decision(0, 0, Choice.DISK, release_op=3, reload_op=5),
            Decision(1, 0, Choice.HOST, release_op=3, reload_op=5, offset_bytes=64),
        ),
    )
    assert [(action.op, action.deed, action.ordinal) for action in program.actions] == [
        (1, Deed.SEND, 1),
        (2, Deed.SEND, 0),
        (3, Deed.RELEASE, 1),
        (3, Deed.RELEASE, 0),
        (5, Deed.FETCH, 0),  # needed before the other
        (5, Deed.FETCH, 1),
    ]


def test_at_one_op_things_go_out_before_others_come_in() -> None:
    program = Program(
        TAPE,
        plan_of(
            Decision(0, 0, Choice.DISK, release_op=2, reload_op=3),
            Decision(1, 0, Choice.DISK, release_op=3, reload_op=4),
        ),
    )
    at_three = [action.deed for action in program.actions if action.op == 3]
    assert at_three == [Deed.RELEASE, Deed.FETCH]


def test_what_is_kept_needs_no_action() -> None:
    program = Program(TAPE, plan_of(Decision(0, 0, Choice.KEEP)))
    assert program.actions == []


def test_what_is_expected_is_listed_by_ordinal() -> None:
    expected = Program(TAPE, plan_of(Decision(0, 0, Choice.DISK, release_op=3, reload_op=5))).expected
    assert [(entry.size_bytes, entry.saved_at, entry.needed_at) for entry in expected.values()] == [
        (500, 1, (6,)),
        (1000, 0, (7,)),
        (1000, 2, ()),
    ]


def test_a_routine_is_recorded_anew_when_it_strays() -> None:
    routine = Routine(Signature((3, 4), torch.float32))
    assert routine.verdict is Verdict.RECORD
    for turn in range(1, MOST_RECORDINGS):
        routine.recorded(TAPE)
        routine.program, routine.verdict = Program(TAPE, plan_of()), Verdict.FOLLOW
        routine.stray()
        assert routine.program is not None, "once may be a step that is not like the others"
        routine.followed()
        for _ in range(STRAYS):
            routine.stray()
        assert (routine.strayed, routine.recordings) == ((1 + STRAYS) * turn, turn)
        assert routine.tape is routine.program is None
        assert routine.verdict is Verdict.RECORD
    routine.recorded(TAPE)
    routine.stray()  # without a program there is nothing to keep to
    assert routine.verdict is Verdict.IMPROVISE, "one that keeps changing is recorded no more"


def test_a_new_recording_makes_old_timings_void() -> None:
    routine = Routine(Signature((3,), torch.float32))
    routine.recorded(TAPE)
    routine.timings.append([("forward0", 1.0)])
    routine.settled = True
    routine.recorded(TAPE)
    assert routine.timings == []
    assert not routine.settled


def run_of(seconds: float, ops: tuple[Op, ...] = OPS) -> list[tuple[str, float]]:
    return [(item.name, seconds * (index + 1)) for index, item in enumerate(ops)]


def test_retimed_takes_the_shortest_time_of_each_op() -> None:
    first, second = run_of(0.1), run_of(0.2)
    second[2] = (second[2][0], 0.01)
    tape = retimed(TAPE, [first, second])
    assert [item.time_s for item in tape.ops[:8]] == pytest.approx([0.1, 0.2, 0.01, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert tape.fingerprint == TAPE.fingerprint
    assert tape.values == TAPE.values


def test_retimed_takes_what_is_usual() -> None:
    tape = retimed(TAPE, [run_of(0.1), run_of(0.3)], fmean)
    assert [item.time_s for item in tape.ops[:3]] == pytest.approx([0.2, 0.4, 0.6])


def test_retimed_spreads_what_follows_backward() -> None:
    """An optimizer's later steps are other ops than its first."""
    longer = [*run_of(0.1)[:8], ("step", 3.0), ("step", 1.0), ("data", 2.0)]
    tape = retimed(TAPE, [longer])
    assert [item.time_s for item in tape.ops[8:]] == pytest.approx([3.0, 3.0])
    nothing = retimed(TAPE, [run_of(0.1)[:8]])
    assert [item.time_s for item in nothing.ops[8:]] == [0.0, 0.0]


def test_retimed_leaves_other_steps_out() -> None:
    other = run_of(0.001)
    other[3] = ("another", 0.001)
    short = run_of(0.001)[:5]
    assert retimed(TAPE, [other, short]) is TAPE
    assert retimed(TAPE, []) is TAPE
    assert retimed(TAPE, [other, run_of(0.1), short]).ops[0].time_s == pytest.approx(0.1)


def test_evened_takes_the_shortest_time_of_ops_that_are_alike() -> None:
    made = (*(value(index, index, index, 7) for index in range(3)), value(3, 3, 3, 7, 2000))
    ops = tuple(
        replace(op("mul" if index != 1 else "add", time_s=time_s), writes=(index,))
        for index, time_s in enumerate((3.0, 5.0, 0.5, 7.0))
    )
    tape = evened(Tape(ops, made, 0, "cpu", "2.13"))
    assert [item.time_s for item in tape.ops] == [0.5, 5.0, 0.5, 7.0], (
        "another name, another size: another op"
    )


@pytest.mark.real_times
def test_the_timer_times_ops_in_order() -> None:
    timer = OpTimer(CpuDevice(Ledger()))
    for pause in (0.0, 0.02):
        timer.begin()
        time.sleep(pause)
        timer.end(f"op{pause}")
        time.sleep(0.2)  # what lies between two ops is of neither
    (first, first_s), (second, second_s) = timer.times()
    assert (first, second) == ("op0.0", "op0.02")
    assert 0 <= first_s < 0.2
    assert 0.02 <= second_s < 0.2


class Queue:
    """A device that has, or has not yet, caught up with the program."""

    is_cuda = True
    torch_device = torch.device("cuda", 0)

    def __init__(self, *, caught_up: bool) -> None:
        self.caught_up = caught_up
        self.waited = 0

    def mark(self) -> Any:
        return SimpleNamespace(
            passed=lambda: self.caught_up, since_s=lambda earlier: 1.0, wait=self._wait_for_mark
        )

    def _wait_for_mark(self) -> None:
        self.waited += not self.caught_up


@pytest.mark.parametrize(("caught_up", "times"), [(True, 5), (False, 1)])
def test_the_timer_keeps_the_device_behind_the_program(
    caught_up: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_busy_s: list[float] = []
    monkeypatch.setattr(private, "keep_busy", lambda device, seconds: kept_busy_s.append(seconds))
    timer = OpTimer(Queue(caught_up=caught_up))  # type: ignore[arg-type]
    for _ in range(12):  # of which the last four follow enough others to tell
        timer.begin()
        timer.end("op")
    assert len(kept_busy_s) == times
    assert all(seconds > 0 for seconds in kept_busy_s)


@pytest.mark.parametrize("caught_up", [True, False])
def test_a_lap_knows_whether_the_device_waited_for_the_program(caught_up: bool) -> None:
    lap = Lap(Queue(caught_up=caught_up))  # type: ignore[arg-type]
    assert not lap.starved
    for _ in range(100):
        lap.note_use()
    assert lap.starved is caught_up


@pytest.mark.real_times
def test_a_lap_that_the_device_is_not_past_is_waited_for() -> None:
    queue = Queue(caught_up=False)
    lap = Lap(queue)  # type: ignore[arg-type]
    assert lap.passed, "it has no end that anybody could wait for"
    assert lap.seconds is None
    lap.end()
    assert not lap.passed
    assert lap.seconds is not None
    assert queue.waited == 1
    queue.caught_up = True
    late = Lap(queue)  # type: ignore[arg-type]
    late.end()
    assert late.passed
    assert late.seconds is not None
    assert queue.waited == 1


def test_a_cpu_is_never_said_to_wait_for_its_program() -> None:
    lap = Lap(CpuDevice(Ledger()))
    for _ in range(100):
        lap.note_use()
    assert not lap.starved
