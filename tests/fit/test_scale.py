"""The tape of any batch from two: exact where things are lines, near on recorded steps, refused otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tapes import GIB, MIB, chain

from tests.fit.batches import recorded, scale, step
from torchlms.core.curve import baseline_curve, smallest_budget
from torchlms.core.tape import Tape
from torchlms.errors import BadOption, PlanMismatch
from torchlms.fit.match import match
from torchlms.fit.scale import Scale, extrapolate

# What docs/fit.md states. Every value of these networks has been found to be on its line, to the byte.
MOST_ERROR = 0.01


def peak_bytes(tape: Tape) -> int:
    return int(baseline_curve(tape).max())


def times_s(tape: Tape) -> list[float]:
    return [op.time_s for op in tape.ops]


def with_times(tape: Tape, *seconds: float) -> Tape:
    ops = tuple(replace(op, time_s=time_s) for op, time_s in zip(tape.ops, seconds, strict=True))
    return replace(tape, ops=ops)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8, 37, 500])
def test_synthetic_steps_are_foretold_exactly(batch: int) -> None:
    made, wanted = extrapolate(step(2), step(4), 2, 4, batch), step(batch)
    assert times_s(made) == pytest.approx(times_s(wanted))
    assert with_times(made, *times_s(wanted)) == wanted


def test_the_order_of_the_two_does_not_matter() -> None:
    assert extrapolate(step(4), step(2), 4, 2, 9) == extrapolate(step(2), step(4), 2, 4, 9)


@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_recorded_steps_are_foretold(name: str) -> None:
    small, large, wanted = (recorded(name, batch).tape for batch in (2, 4, 8))
    made = extrapolate(small, large, 2, 4, 8)
    assert peak_bytes(made) == pytest.approx(peak_bytes(wanted), rel=MOST_ERROR)
    assert smallest_budget(made) == pytest.approx(smallest_budget(wanted), rel=MOST_ERROR)
    assert peak_bytes(wanted) > 1.3 * peak_bytes(large), "nothing grew, so nothing was shown"
    assert [op.name for op in made.ops] == [op.name for op in wanted.ops]
    assert [v.size_bytes for v in made.values] == [v.size_bytes for v in wanted.values], "not just the peak"
    assert made.fingerprint == wanted.fingerprint, "so that a plan for it could be used"


def test_what_autograd_keeps_at_the_smaller_batch_only() -> None:
    """Scores of ten classes: 320 bytes at batch 8, which are kept, and 640 at batch 16, which are counted."""
    small, large, wanted = (recorded("mnist", batch).tape for batch in (8, 16, 32))
    phases = [[op.phase for op in tape.ops] for tape in (small, large)]
    assert phases[0] != phases[1], "where the backward pass begins is not seen at the smaller batch"
    made = extrapolate(small, large, 8, 16, 32)
    assert [op.phase for op in made.ops] == [op.phase for op in wanted.ops]
    assert peak_bytes(made) == pytest.approx(peak_bytes(wanted), rel=MOST_ERROR)


def test_blocks_stay_whole_and_what_does_not_grow_stays() -> None:
    small, large = step(2), step(4)
    odd = [replace(value, size_bytes=value.size_bytes + 512 * (value.id % 2)) for value in large.values]
    odd[0] = replace(odd[0], size_bytes=small.values[0].size_bytes)
    made = extrapolate(small, replace(large, values=tuple(odd)), 2, 4, 5)
    assert all(value.size_bytes % 512 == 0 for value in made.values)
    assert made.values[0].size_bytes == small.values[0].size_bytes


def test_bytes_are_never_negative() -> None:
    """A workspace that shrank: a library took another algorithm at the larger batch."""
    small = replace(step(2), resident_bytes=GIB)
    small = replace(small, ops=tuple(replace(op, scratch_bytes=GIB) for op in small.ops))
    made = extrapolate(small, step(4), 2, 4, 1000)
    assert min(op.scratch_bytes for op in made.ops) == 0
    assert made.resident_bytes == step(4).resident_bytes, "of no known origin, so not taken to vanish"


def test_times_never_fall_and_noise_does_not_lengthen_the_step() -> None:
    small, large = step(2), step(4)
    noisy = [op.time_s * (0.5 if index % 3 else 1.2) for index, op in enumerate(large.ops)]
    noisy = [noise * sum(times_s(large)) / sum(noisy) for noise in noisy]
    pair = Scale.of(small, with_times(large, *noisy), 2, 4)
    before = [0.0] * len(small.ops)
    for batch in (1, 2, 3, 4, 8, 16, 64):
        now = times_s(pair.at(batch))
        assert all(later >= earlier >= 0 for earlier, later in zip(before, now, strict=True))
        before = now
    assert sum(times_s(pair.at(64))) == pytest.approx(sum(times_s(step(64))))


def test_a_step_that_got_faster_is_taken_to_stay_as_it_is() -> None:
    small, large = step(2), step(4)
    pair = Scale.of(small, with_times(large, *(0.5 * op.time_s for op in small.ops)), 2, 4)
    assert times_s(pair.at(4)) == times_s(pair.at(400)) == [0.75 * op.time_s for op in small.ops]


# Tapes that differ.


def parts(small: Tape, large: Tape) -> str:
    with pytest.raises(PlanMismatch) as refused:
        match(small, large)
    return str(refused.value)


def test_other_ops_are_named() -> None:
    large = step(4)
    ops = list(large.ops)
    ops[5] = replace(ops[5], name="aten.gelu")
    said = parts(step(2), replace(large, ops=tuple(ops)))
    assert "part at op 5: aten.convolution" in said
    assert "aten.gelu" in said
    assert "layer4" in said


def test_a_tape_that_ends_early() -> None:
    assert "the end in one" in parts(step(2, layers=7), step(4)) or "part at op" in parts(
        step(2, layers=7), step(4)
    )
    large = step(4)
    assert f"part at op {len(large.ops) - 1}" in parts(step(2), replace(large, ops=large.ops[:-1]))


def test_another_network() -> None:
    assert "part at op" in parts(step(2), chain())


def test_ops_that_read_other_values() -> None:
    large = step(4)
    ops = list(large.ops)
    ops[3] = replace(ops[3], reads=(0,))
    assert "part at op 3" in parts(step(2), replace(large, ops=tuple(ops)))


def test_values_of_other_kinds_or_births() -> None:
    large = step(4)
    values = list(large.values)
    values[2] = replace(values[2], birth=0)
    assert "not the same step" in parts(step(2), replace(large, values=tuple(values)))


def test_another_order_of_saving() -> None:
    large = step(4)
    values = list(large.values)
    values[1], values[2] = (
        replace(values[1], saved=values[2].saved),
        replace(values[2], saved=values[1].saved),
    )
    assert "another order" in parts(step(2), replace(large, values=tuple(values)))


def test_saved_in_one_only() -> None:
    large = step(4)
    values = list(large.values)
    values[1] = replace(values[1], saved=-1)
    changed = replace(large, values=tuple(values))
    assert "in one only" in parts(step(2), changed)
    assert "in one only" in parts(changed, step(2))


def test_what_is_too_small_to_be_saved_there_is_no_difference() -> None:
    small = step(2)
    values = list(small.values)
    values[1] = replace(values[1], saved=-1, size_bytes=512)
    assert match(replace(small, values=tuple(values)), step(4))[1] == 1


def test_ids_may_differ() -> None:
    """They follow from who was met first, and that depends on what is too small to be saved."""
    small = step(2)
    count = len(small.values)
    values = tuple(replace(value, id=count - 1 - value.id) for value in reversed(small.values))
    ops = tuple(
        replace(
            op,
            reads=tuple(count - 1 - value for value in op.reads),
            writes=tuple(count - 1 - value for value in op.writes),
        )
        for op in small.ops
    )
    turned = replace(small, ops=ops, values=values)
    assert match(turned, step(4)) == tuple(range(count - 1, -1, -1))
    assert extrapolate(turned, step(4), 2, 4, 8) == extrapolate(small, step(4), 2, 4, 8)


def test_tapes_of_two_machines() -> None:
    assert "different places" in parts(step(2, device="cpu"), step(4))


@pytest.mark.parametrize(("batches", "said"), [((4, 4), "a line needs two"), ((0, 4), "start at 1")])
def test_batches_that_give_no_line(batches: tuple[int, int], said: str) -> None:
    with pytest.raises(BadOption, match=said):
        extrapolate(step(2), step(4), *batches, 8)


def test_two_recordings_of_one_size_tell_nothing() -> None:
    """Of one batch under two names, or of a batch maker that does not heed the size."""
    with pytest.raises(BadOption, match=r"as many bytes as that of batch 2: .* make_batch heed"):
        extrapolate(step(2), step(2), 2, 4, 8)


def test_batch_zero_is_refused() -> None:
    with pytest.raises(BadOption, match="1 or more"):
        scale().at(0)
    assert scale().at(3).values[0].size_bytes == 3 * MIB
