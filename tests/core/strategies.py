"""Random small tapes, machines and legal decisions for property tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st
from tapes import cpu, gpu

from torchlms.core.plan import Choice, Decision
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value

if TYPE_CHECKING:
    from torchlms.core.machine import Machine

seconds = st.integers(1, 10_000).map(lambda thousandths: thousandths / 997)
megabytes = st.integers(1, 4000).map(lambda thousands: thousands * 1009)


@st.composite
def machines(draw: st.DrawFn, *, link: bool | None = None) -> Machine:
    disk = draw(st.sampled_from([3e5, 1e6]))
    if link is False or (link is None and draw(st.booleans())):
        return cpu(disk=disk)
    return gpu(
        link=draw(st.sampled_from([3e5, 1e6, 4e6])), share=draw(st.sampled_from([1.0, 0.9, 0.55])), disk=disk
    )


@st.composite
def tapes(draw: st.DrawFn, *, wrapping: bool = False, max_ops: int = 8, max_values: int = 5) -> Tape:
    count = draw(st.integers(3, max_ops))
    ops = tuple(
        Op(
            f"op{index}",
            f"module{index % 3}",
            Phase.FORWARD if 2 * index < count else Phase.BACKWARD,
            draw(seconds),
            (),
            (),
            draw(st.integers(0, 3)) * 100_003,
        )
        for index in range(count)
    )
    values = []
    for index in range(draw(st.integers(1, max_values))):
        if wrapping and draw(st.booleans()):
            stop, start = sorted(
                draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
            )
            birth, death = -1, count
        else:
            start, stop = sorted(
                draw(st.lists(st.integers(1, count - 1), min_size=2, max_size=2, unique=True))
            )
            birth, death = draw(st.integers(-1, start - 1)), draw(st.integers(stop, count - 1))
        values.append(
            Value(
                index,
                Kind.ACTIVATION,
                draw(megabytes),
                birth,
                death,
                (Stretch(start, stop),),
                saved=index,
                movable=True,
            )
        )
    return Tape(ops, tuple(values), draw(st.integers(0, 1000)), "cuda", "2.13")


@st.composite
def decisions(draw: st.DrawFn, tape: Tape, machine: Machine) -> tuple[Decision, ...]:
    """Legal in time; places are not given."""
    made = []
    count = len(tape.ops)
    for value in tape.values:
        stretch = value.idle[0]
        length = (stretch.stop - stretch.start) % count
        if draw(st.integers(0, 4)) == 0:
            continue
        release, reload = sorted(draw(st.lists(st.integers(0, length), min_size=2, max_size=2, unique=True)))
        choice = (
            draw(st.sampled_from([Choice.HOST, Choice.HOST, Choice.DISK])) if machine.link else Choice.DISK
        )
        made.append(
            Decision(value.id, 0, choice, (stretch.start + release) % count, (stretch.start + reload) % count)
        )
    return tuple(made)
