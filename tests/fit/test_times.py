"""Op times without what watching them cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fit.batches import RECORDED, scale, step
from torchlms.fit import recording
from torchlms.fit.scale import Scale
from torchlms.fit.times import eased, kept_busy, outgrew_its_batch


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9, 1.0, 1.7])
def test_times_add_up_to_the_step(share: float) -> None:
    tape = step(4)
    before = [op.time_s for op in tape.ops]
    made = [op.time_s for op in eased(tape, share * sum(before)).ops]
    assert sum(made) == pytest.approx(share * sum(before))
    assert min(made) >= 0


def test_the_same_is_taken_from_every_op_that_has_it() -> None:
    tape = step(4)
    toll_s = 1e-5
    marked = replace(tape, ops=tuple(replace(op, time_s=op.time_s + toll_s) for op in tape.ops))
    made = eased(marked, sum(op.time_s for op in tape.ops))
    assert [op.time_s for op in made.ops] == pytest.approx([op.time_s for op in tape.ops])


def test_a_slow_recording_does_not_leave_ops_that_take_no_time() -> None:
    """Where all was twice as slow while it was measured, the ops keep their proportions."""
    tape = step(4)
    slow = replace(tape, ops=tuple(replace(op, time_s=2 * op.time_s + 1e-3) for op in tape.ops))
    made = eased(slow, 0.5 * sum(op.time_s for op in slow.ops))
    assert min(op.time_s for op in made.ops) > 0
    longest, shortest = max(made.ops, key=lambda op: op.time_s), min(made.ops, key=lambda op: op.time_s)
    before = {op.name + op.module: op.time_s for op in slow.ops}
    measured = before[longest.name + longest.module] / before[shortest.name + shortest.module]
    assert longest.time_s / shortest.time_s == pytest.approx(measured, rel=0.1)


def test_an_empty_tape_stays_empty() -> None:
    assert eased(replace(step(4), ops=()), 1.0).ops == ()


def test_a_device_that_waits_is_noticed() -> None:
    assert kept_busy(scale())
    waiting = Scale.of(step(2, fixed_s=1.0), step(4, fixed_s=1.0), 2, 4)
    assert not kept_busy(waiting)


def test_a_recording_that_something_was_in_the_way_of_is_noticed() -> None:
    assert not outgrew_its_batch(scale())
    tape = step(4)
    slow = replace(tape, ops=tuple(replace(op, time_s=1.6 * op.time_s) for op in tape.ops))
    assert outgrew_its_batch(Scale.of(step(2), slow, 2, 4))


def test_without_room_for_plain_steps_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "host_available_bytes", lambda: 0)
    said: list[str] = []
    assert recording.record(RECORDED["transformer"], 2, said.append).tape.ops
    assert any("no room for plain steps" in line for line in said)
