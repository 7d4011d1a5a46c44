"""The simulator against a second one of another build, and against sums done by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import reference
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from tapes import MIB, chain, cpu, gpu, resnet

from torchlms.core.plan import Choice, Decision
from torchlms.core.simulate import (
    Simulator,
    baseline_curve,
    floor_curve,
    memory_curve,
    prediction,
    simulate,
    smallest_budget,
)
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value
from torchlms.core.walk import SETTLING_LAPS
from torchlms.errors import NotSupported


@settings(max_examples=400, deadline=None)
@given(st.data(), st.booleans())
def test_agrees_with_the_reference(data: st.DataObject, wrapping: bool) -> None:
    tape = data.draw(strategies.tapes(wrapping=wrapping))
    machine = data.draw(strategies.machines())
    decisions = data.draw(strategies.decisions(tape, machine))
    around = any(
        tape.values[decision.value].idle[0].stop <= tape.values[decision.value].idle[0].start
        for decision in decisions
    )
    timeline = simulate(tape, machine, decisions)
    expected = reference.step_seconds(tape, machine, decisions, laps=SETTLING_LAPS if around else 1)
    assert timeline.step_s == pytest.approx(float(expected), rel=1e-9)
    assert timeline.memory_bytes.tolist() == reference.memory(tape, decisions)
    assert timeline.peak_device_bytes == max(reference.memory(tape, decisions))
    assert timeline.step_s == pytest.approx(timeline.compute_s + timeline.stall_s)
    assert Simulator(tape, machine).stall_s(decisions) == timeline.stall_s


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_times_are_in_order(data: st.DataObject) -> None:
    tape = data.draw(strategies.tapes())
    machine = data.draw(strategies.machines())
    decisions = data.draw(strategies.decisions(tape, machine))
    timeline = simulate(tape, machine, decisions)
    assert len(timeline.transfers) == 2 * len(decisions)
    for transfer in timeline.transfers:
        assert -1e-9 <= transfer.issued_s <= transfer.start_s + 1e-9
        assert transfer.start_s <= transfer.end_s <= timeline.step_s + 1e-9
    assert (timeline.start_s[1:] >= timeline.end_s[:-1] - 1e-9).all()
    assert timeline.end_s[-1] == pytest.approx(timeline.step_s)


def _two_ops_away() -> Tape:
    """One value of 1 MB, made by op 0, idle during ops 1 and 2, needed by op 3; each op takes 1 s."""
    ops = tuple(Op(f"op{index}", "", Phase.FORWARD, 1.0, (), ()) for index in range(4))
    value = Value(0, Kind.ACTIVATION, 1_000_000, 0, 3, (Stretch(1, 3),), saved=0, movable=True)
    return Tape(ops, (value,), 7, "cuda", "2.13")


def test_by_hand_a_copy_that_hides() -> None:
    machine = gpu(link=2e6, latency_s=0.0)  # half a second each way
    timeline = simulate(_two_ops_away(), machine, [Decision(0, 0, Choice.HOST, 2, 3)])
    assert timeline.memory_bytes.tolist() == [1_000_007, 1_000_007, 7, 1_000_007]
    assert timeline.step_s == pytest.approx(4.5)  # issued when it is needed: half a second late
    out, back = timeline.transfers
    assert (out.direction, out.start_s, out.end_s) == ("out", 1.0, pytest.approx(1.5))
    assert (back.direction, back.issued_s, back.end_s) == ("in", 3.0, pytest.approx(3.5))
    assert prediction(timeline, arena_bytes=5).arena_bytes == 5


def test_by_hand_release_before_the_copy_ends() -> None:
    machine = gpu(link=2e6, latency_s=0.0)
    timeline = simulate(_two_ops_away(), machine, [Decision(0, 0, Choice.HOST, 1, 2)])
    assert timeline.step_s == pytest.approx(4.5)  # waits at op 1; the copy back hides behind op 2
    assert timeline.start_s.tolist() == pytest.approx([0.0, 1.5, 2.5, 3.5])


def test_by_hand_disk_without_a_link() -> None:
    timeline = simulate(_two_ops_away(), cpu(disk=2e6), [Decision(0, 0, Choice.DISK, 1, 2)])
    assert timeline.step_s == pytest.approx(4.5)
    assert timeline.disk_bytes == 1_000_000


def test_a_wrapping_value_comes_back_in_the_last_lap() -> None:
    ops = tuple(Op(f"op{index}", "", Phase.FORWARD, 1.0, (), ()) for index in range(4))
    state = Value(0, Kind.STATE, 1_000_000, -1, 4, (Stretch(2, 1),), movable=True)
    tape = Tape(ops, (state,), 0, "cuda", "2.13")
    timeline = simulate(tape, gpu(link=1e6, latency_s=0.0), [Decision(0, 0, Choice.HOST, 3, 0)])
    assert timeline.memory_bytes.tolist() == [1_000_000, 1_000_000, 1_000_000, 0]
    assert timeline.stall_s == pytest.approx(0.0)
    assert floor_curve(tape).tolist() == [1_000_000] * 4
    assert floor_curve(tape, wrapping=True).tolist() == [0, 1_000_000, 0, 0]


def test_refuses_what_it_cannot_judge() -> None:
    tape = _two_ops_away()
    with pytest.raises(NotSupported, match="CPU"):
        simulate(tape, cpu(), [Decision(0, 0, Choice.HOST, 1, 2)])
    with pytest.raises(NotSupported, match="recompute"):
        simulate(tape, gpu(), [Decision(0, 0, Choice.RECOMPUTE, 1, 2)])


def test_keep_is_nothing() -> None:
    tape = chain()
    timeline = simulate(tape, gpu(), [Decision(0, 0, Choice.KEEP)])
    assert timeline.stall_s == 0
    assert timeline.transfers == ()
    assert (timeline.memory_bytes == baseline_curve(tape)).all()


@settings(max_examples=50, deadline=None)
@given(strategies.tapes())
def test_curves_by_definition(tape: Tape) -> None:
    whole = tuple(
        Decision(value.id, 0, Choice.HOST, value.idle[0].start, value.idle[0].stop) for value in tape.values
    )
    assert baseline_curve(tape).tolist() == reference.memory(tape, ())
    assert floor_curve(tape).tolist() == reference.memory(tape, whole)
    assert memory_curve(tape, whole).tolist() == reference.memory(tape, whole)
    assert smallest_budget(tape) == max(reference.memory(tape, whole))


def test_an_empty_tape() -> None:
    timeline = simulate(Tape((), (), 5 * MIB, "cuda", "2.13"), gpu(), [])
    assert (timeline.step_s, timeline.peak_device_bytes) == (0.0, 5 * MIB)


def test_link_work_is_conserved() -> None:
    """All copies of a busy step together take no less than their lone times on each direction."""
    tape, machine = resnet(8), gpu(share=1.0)
    decisions = [
        Decision(value.id, 0, Choice.HOST, value.idle[0].start, value.idle[0].stop)
        for value in tape.values
        if value.movable
    ]
    timeline = simulate(tape, machine, decisions)
    for direction in ("out", "in"):
        copies = [transfer for transfer in timeline.transfers if transfer.direction == direction]
        copies.sort(key=lambda transfer: transfer.start_s)
        for transfer in copies:
            alone_s = machine.out_s(transfer.size_bytes)
            assert transfer.end_s - transfer.start_s == pytest.approx(alone_s)
        for one, following in pairwise(copies):
            assert following.start_s >= one.end_s - 1e-12
