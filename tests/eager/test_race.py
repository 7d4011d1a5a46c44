"""Plans are timed against each other, and the fastest one stays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sessions import (
    DROPPING,
    SMALL,
    new_session,
    open_lms,
    outcome,
    plain_peak,
    plain_step,
    run_plain,
    slow_disk,
)
from small_networks import NETWORKS

from torchlms.core.again import with_drops
from torchlms.core.calibrate import Rates, foretold
from torchlms.core.drops import Drops
from torchlms.core.machine import Machine
from torchlms.core.pace import lap_s
from torchlms.core.plan import Budget, Choice, Decision, Plan, Prediction
from torchlms.core.tape import Tape
from torchlms.eager import provenance
from torchlms.eager.engine import Engine
from torchlms.eager.program import Program
from torchlms.eager.replayable import may_replay
from torchlms.eager.routine import TIMINGS, Routine
from torchlms.eager.timer import Lap, OpTimer
from torchlms.maker import Maker
from torchlms.memory.disk import SpillFile
from torchlms.race import BEHIND, TIMED_LAPS, WARM_LAPS, Contender, Race
from torchlms.referee import Referee, race_of

NETWORK = NETWORKS["mlp"]
# Recorded, timed, timed once more, four plans, the winner once more, and a step in which to notice that.
STEPS = 6 + 5 * (WARM_LAPS + TIMED_LAPS)


def contender(name: str, *laps_s: float) -> Contender:
    return Contender(None, name, laps_s=[9.0] * WARM_LAPS + list(laps_s))  # type: ignore[arg-type]


def test_a_plan_is_known_by_what_it_does() -> None:
    """Whatever its order, its reasons, and where in host memory it puts the bytes."""
    moves = [
        Decision(value, 0, choice, 4, 9, offset_bytes=0)
        for value, choice in ((1, Choice.HOST), (2, Choice.RECOMPUTE), (3, Choice.HOST))
    ]
    kept = Decision(7, 0, Choice.KEEP)
    predicted = Prediction(0, 0, 1.0, 1.0, 0.0)

    def made(*decisions: Decision) -> Plan:
        return Plan("", "", "", Budget(1, 1, 1), decisions, predicted)

    race = Race([Contender(made(*moves), "first")])
    elsewhere = [replace(move, offset_bytes=512, reason="another") for move in reversed(moves)]
    assert race.knows(made(*elsewhere, kept))
    for change in ({"choice": Choice.DISK}, {"release_op": 5}, {"reload_op": 8}, {"passing": True}):
        assert not race.knows(made(replace(moves[0], **change), *moves[1:]))
    assert not race.knows(made(*moves[1:]))


def test_the_first_stays_unless_another_is_clearly_faster() -> None:
    first = contender("first", 1.0, 1.1, 1.0, 1.0)
    near, fast = contender("near", 0.99, 0.99, 0.99, 0.99), contender("fast", 0.5, 0.5, 0.6, 0.5)
    late = contender("late", 0.1)
    assert Race([first, near]).winner() is first
    assert Race([first, near, fast]).winner() is fast
    assert Race([first, late]).winner() is first, "not done yet"
    assert Race([first, fast]).first is first.plan
    assert not late.done
    assert fast.done
    assert "first 1000.0 ms" in Race([first, fast]).result()
    assert Race([first, fast]).result().endswith("fast stays")


class SlowLap:
    """One that the device is past when it is told so, or waited for."""

    starved, values_s, again_s = False, 0.0, 0.0

    def __init__(self, seconds: float | None, *, passed: bool = False) -> None:
        self._seconds = seconds
        self.passed = passed
        self.waited_for = False

    @property
    def seconds(self) -> float | None:
        self.waited_for |= not self.passed
        return self._seconds


def test_a_program_that_runs_ahead_is_not_made_to_wait_to_be_timed() -> None:
    runner = contender("runner")
    runner.laps_s.clear()
    laps = [SlowLap(float(number)) for number in range(BEHIND + 2)]
    for lap in laps[:BEHIND]:
        runner.ran(lap, remapped=True)  # type: ignore[arg-type]
    assert runner.laps_s == []
    laps[0].passed = True
    runner.ran(laps[BEHIND], remapped=False)  # type: ignore[arg-type]
    assert runner.laps_s == [0.0]
    assert not any(lap.waited_for for lap in laps)
    runner.ran(laps[BEHIND + 1], remapped=False)  # type: ignore[arg-type]
    assert runner.laps_s == [0.0, 1.0], "the device is far behind, and is waited for"
    assert [lap.waited_for for lap in laps] == [False, True, False, False]
    assert runner.remapped_laps == 2
    runner.ran(SlowLap(None, passed=True), remapped=False)  # type: ignore[arg-type]
    for lap in laps:
        lap.passed = True
    runner.ran(SlowLap(None, passed=True), remapped=False)  # type: ignore[arg-type]
    assert runner.laps_s == [0.0, 1.0, 2.0, 3.0], "one without an end has no time"
    runner.ran(SlowLap(7.0), remapped=False)  # type: ignore[arg-type]
    runner.forget_laps()
    runner.ran(SlowLap(8.0, passed=True), remapped=False)  # type: ignore[arg-type]
    assert runner.laps_s == [8.0], "and not what ran before"


OP_S = 1e-5


def know_times(
    monkeypatch: pytest.MonkeyPatch,
    machine: Machine,
    timer_says: Callable[[int], float] = lambda timing: 1.0,
    stalled: Callable[[Race | None], bool] = lambda race: False,
) -> list[OpTimer]:
    """Ops that take ``OP_S`` and a disk as fast as that of ``machine``: a lap takes what follows for the plan
    that runs, and not what this computer has time for. LMS is told of another disk, and of ops that take
    ``timer_says(n)`` times as long in the n-th step whose ops are timed. A lap in which the machine is
    ``stalled`` takes three times as long. Returns who timed the ops."""
    slow_disk(monkeypatch)
    right, note = OpTimer.times, Referee.note
    timers: list[OpTimer] = []
    now_s = 0.0

    def times(self: OpTimer) -> list[tuple[str, float]]:
        timers.append(self)
        return [(name, OP_S * timer_says(len(timers))) for name, _ in right(self)]

    def noted(self: Referee, engine: Engine, routine: Routine) -> None:
        nonlocal now_s
        if routine.tape is not None and routine.program is not None:
            tape = replace(routine.tape, ops=tuple(replace(op, time_s=OP_S) for op in routine.tape.ops))
            now_s = lap_s(tape, foretold(tape, machine, routine.program.plan).step_s)
            now_s *= 3 if stalled(race_of(routine)) else 1
        note(self, engine, routine)

    monkeypatch.setattr(OpTimer, "times", times)
    monkeypatch.setattr(Referee, "note", noted)
    monkeypatch.setattr(Lap, "seconds", property(lambda self: None if self._end is None else now_s))
    return timers


def raced(spill_dir: Path, caplog: pytest.LogCaptureFixture) -> tuple[Any, Tape, list[str]]:
    caplog.set_level(logging.INFO, logger="torchlms")
    budget_bytes = int(0.6 * plain_peak(NETWORK))
    session = new_session(NETWORK)
    with open_lms(session, budget_bytes, spill_dir, rules=DROPPING) as lms:
        for step in range(STEPS):
            plain_step(session, step)
        assert lms.state == "guard"
        plan, tape, stats = lms.plan, lms.tape, lms.stats()
        assert tape is not None
        assert lms._engine is not None
        assert lms._director is not None
        (program,) = lms._engine.routines.programs()
        usual = lms._engine.routines.usual()
        assert usual is not None
        race = race_of(usual)
        assert race is not None
        assert race.over
        assert program is race.winner().program, "what was learned of the winner while it ran is kept"
    assert outcome(session).differences(run_plain(NETWORK, steps=STEPS)) == []
    assert stats["peak_device_bytes"] <= stats["budget_bytes"]
    return plan, tape, [record.getMessage() for record in caplog.records if "raced" in record.getMessage()]


def first_said_s(texts: list[str]) -> float:
    """The step that the first plan foretold, by the log."""
    return next(float(text.split(", step ")[1].split()[0]) for text in texts if ", step " in text) / 1e3


def test_a_disk_that_is_faster_than_was_thought(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, machine: Machine
) -> None:
    """Thought to be a thousand times too slow: the next plan is for a faster one. It is the same, for every
    byte has to move, and is not tried again; but what it predicts is put right.

    Where only little can be made again, so that something has to move.
    """
    know_times(monkeypatch, machine)

    def little(func: object, device_type: str) -> bool:
        return not any(name in str(func) for name in ("mm", "bernoulli")) and may_replay(func, device_type)

    monkeypatch.setattr(provenance, "may_replay", little)
    monkeypatch.setattr(provenance, "_manners", provenance._manners.__wrapped__)  # what others have asked for
    rates: list[Rates] = []
    other = Maker.other

    def noted(self: Maker, tape: Tape, found: Rates, **options: Any) -> Plan | None:
        rates.append(found)
        return other(self, tape, found, **options)

    monkeypatch.setattr(Maker, "other", noted)
    plan, _, said = raced(spill_dir, caplog)
    assert said == []
    assert rates[0].copies == pytest.approx(2.0, rel=1e-3)
    texts = [record.getMessage() for record in caplog.records]
    assert sum("as was predicted: copies taken to be 2.00 times as fast" in text for text in texts) == 1
    assert plan.predicted.step_s < 0.75 * first_said_s(texts)


def test_moves_alone_are_calibrated_as_well(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, machine: Machine
) -> None:
    """What the first plan predicts for a disk that is thought to be slow is not what the log ends with."""
    know_times(monkeypatch, machine)
    caplog.set_level(logging.INFO, logger="torchlms")
    # Before the session: it draws random numbers, if nobody has asked for it yet.
    budget_bytes = int(0.6 * plain_peak(NETWORK))
    session = new_session(NETWORK)
    with open_lms(session, budget_bytes, spill_dir, rules=SMALL) as lms:
        for step in range(STEPS):
            plain_step(session, step)
        texts = [record.getMessage() for record in caplog.records]
        assert lms.plan is not None
        assert lms.plan.predicted.step_s < 0.75 * first_said_s(texts)
        assert "no plan can bring this step" not in lms.report(), "it takes less than that"
    assert outcome(session).differences(run_plain(NETWORK, steps=STEPS)) == []


def test_laps_are_timed_no_longer_than_somebody_asks(spill_dir: Path) -> None:
    session = new_session(NETWORK)
    with open_lms(session, int(0.6 * plain_peak(NETWORK)), spill_dir, rules=SMALL) as lms:
        timed = []
        for step in range(STEPS + 1):
            plain_step(session, step)
            assert lms._engine is not None
            timed.append(lms._engine.now.lap is not None)
    assert any(timed)
    assert not timed[-1], "the race is over"


@pytest.mark.slow
@pytest.mark.real_times
def test_moving_alone_wins_where_making_again_is_slow(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is a little too dear by what was measured, and ops that take far longer when run again."""
    slow_disk(monkeypatch)
    from torchlms.eager.watcher import Watcher

    right = Watcher.run_again

    def slowly(self: Watcher, *args: Any) -> Any:
        time.sleep(0.02)
        return right(self, *args)

    monkeypatch.setattr(Watcher, "run_again", slowly)
    monkeypatch.setattr("torchlms.referee.CLOSE", 1e9)
    plan, _, said = raced(spill_dir, caplog)
    assert len(said) == 1
    assert said[0].endswith("moving alone stays")
    assert not any(move.choice is Choice.RECOMPUTE for move in plan.moves)


@pytest.mark.slow
@pytest.mark.real_times
def test_making_again_wins_where_the_disk_is_slow(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow_disk(monkeypatch)
    right = SpillFile.read

    def slowly(self: SpillFile, *args: Any) -> Any:
        time.sleep(0.02)
        return right(self, *args)

    learn, learned = Program.learn_anew, list[Plan]()

    def noted(self: Program) -> None:
        learned.append(self.plan)
        learn(self)

    monkeypatch.setattr(Program, "learn_anew", noted)
    monkeypatch.setattr(SpillFile, "read", slowly)
    monkeypatch.setattr("torchlms.referee.CLOSE", 1e9)
    plan, _, said = raced(spill_dir, caplog)
    assert len(said) == 1
    assert not said[0].endswith("moving alone stays")
    assert [learner.decisions for learner in learned] == [plan.decisions], "another ran last"
    assert any(move.choice is Choice.RECOMPUTE for move in plan.moves)


def test_ops_that_were_timed_too_long(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, machine: Machine
) -> None:
    """Once the race is over the plan predicts what its steps have shown."""
    know_times(monkeypatch, machine, lambda timing: 20.0)
    plan, tape, _ = raced(spill_dir, caplog)
    texts = [record.getMessage() for record in caplog.records]
    assert sum("as was predicted: ops taken to be 0.50 times as long" in text for text in texts) == 1
    # With the times that explain the steps, and not those that were measured.
    told = with_drops(tape, Drops.of(tape, plan.moves))
    assert plan.predicted.compute_s == pytest.approx(sum(op.time_s for op in told.ops), rel=0.01)


def test_ops_that_were_timed_a_little_too_short(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, machine: Machine
) -> None:
    """Nothing is tried for so little, but the plan predicts what its steps have shown."""
    know_times(monkeypatch, machine, lambda timing: 0.96)
    plan, tape, said = raced(spill_dir, caplog)
    assert not any("taken to" in text for text in said)
    told = with_drops(tape, Drops.of(tape, plan.moves))
    true_s = OP_S * sum(op.time_s / tape.ops[0].time_s for op in told.ops)
    assert plan.predicted.compute_s == pytest.approx(true_s, rel=0.01)


def test_ops_that_take_longer_once_the_device_is_warm(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, machine: Machine
) -> None:
    """They are timed once more, and copies are not blamed."""
    timers = know_times(monkeypatch, machine, lambda timing: 0.2 if timing <= TIMINGS else 1.0)
    raced(spill_dir, caplog)
    assert len(timers) == TIMINGS + 1
    texts = [record.getMessage() for record in caplog.records]
    warm = [text for text in texts if "that has run for a while ops take 2.00 times as long" in text]
    assert len(warm) == 1  # which is as far as a correction goes
    corrected = [text for text in texts if "as was predicted: " in text]
    assert len(corrected) == 1
    assert "ops taken to be 2.00 times as long" in corrected[0]


def test_a_machine_that_was_busy_meanwhile(
    spill_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, machine: Machine
) -> None:
    """What the plans took in a race beside something else is not what their steps are said to take."""
    know_times(monkeypatch, machine, stalled=lambda race: race is None or not race.confirming)
    plan, tape, _ = raced(spill_dir, caplog)
    told = with_drops(tape, Drops.of(tape, plan.moves))
    true_s = OP_S * sum(op.time_s / tape.ops[0].time_s for op in told.ops)
    assert plan.predicted.compute_s == pytest.approx(true_s, rel=0.07)
