"""Data loading: folded where two tapes part in it, with everything of the step left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fit.batches import loaded
from tests.fit.test_scale import MOST_ERROR
from torchlms.core.curve import baseline_curve, floor_curve, peak_bytes, smallest_budget
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value
from torchlms.errors import PlanMismatch
from torchlms.fit.loading import NAME, folded, loading_ops
from torchlms.fit.match import match
from torchlms.fit.scale import Scale, extrapolate


def fold(tape: Tape) -> Tape:
    pair = folded(tape, tape)
    assert pair is not None
    return pair[0]


def names(tape: Tape) -> list[str]:
    return [op.name for op in tape.ops]


def test_a_loop_with_a_loader_is_foretold() -> None:
    small, large, wanted = loaded(4), loaded(8), loaded(16)
    with pytest.raises(PlanMismatch, match="part at op"):
        match(small, large)
    made = extrapolate(small, large, 4, 8, 16)
    assert peak_bytes(made) == pytest.approx(peak_bytes(wanted), rel=MOST_ERROR)
    assert smallest_budget(made) == pytest.approx(smallest_budget(wanted), rel=MOST_ERROR)
    assert peak_bytes(wanted) > 1.3 * peak_bytes(large), "nothing grew, so nothing was shown"
    assert names(made) == names(fold(wanted))
    assert made.fingerprint == wanted.fingerprint, "so that a plan for it could be used"
    assert made == extrapolate(large, small, 8, 4, 16)


def test_the_batch_that_waits_grows_and_loading_is_foretold_too() -> None:
    made, wanted = extrapolate(loaded(4), loaded(8), 4, 8, 16), loaded(16)
    during = [baseline_curve(tape)[sorted(loading_ops(tape))].max() for tape in (made, wanted)]
    assert during[0] == pytest.approx(during[1], rel=MOST_ERROR)
    batch_bytes = 16 * 4 * 3 * 16 * 16
    assert [value.size_bytes for value in made.values if value.birth >= 0 and value.op == NAME][-1] == (
        batch_bytes
    )


@pytest.mark.parametrize("ahead", [(2, 0), (0, 2), (1, 3)])
def test_what_a_loader_took_ahead_does_not_matter(ahead: tuple[int, int]) -> None:
    """With workers it is chance. Never less than the step needs, and not much more."""
    small, large, wanted = loaded(4, ahead=ahead[0]), loaded(8, ahead=ahead[1]), loaded(16)
    made = extrapolate(small, large, 4, 8, 16)
    assert made.fingerprint == wanted.fingerprint
    ahead_bytes = (1 + 2 * max(ahead)) * 16 * 4 * 3 * 16 * 16
    assert peak_bytes(wanted) <= peak_bytes(made) <= peak_bytes(wanted) + ahead_bytes


def test_ops_of_the_optimizer_stay() -> None:
    tape = loaded(4)
    kept = [op for op in fold(tape).ops if op.phase is Phase.BETWEEN and op.name != NAME]
    for word in ("addcdiv_", "lerp_", "sqrt", "_local_scalar_dense"):
        there = [op.name for op in tape.ops if word in op.name and op.phase is Phase.BETWEEN]
        assert [op.name for op in kept if word in op.name] == there != []
    assert not any("linspace" in op.name or "stack" in op.name for op in kept)


def test_folding_leaves_the_step_as_it_is() -> None:
    tape = loaded(4)
    made = fold(tape)
    assert (peak_bytes(made), smallest_budget(made)) == (peak_bytes(tape), smallest_budget(tape))
    assert made.fingerprint == tape.fingerprint
    inside = next(index for index, op in enumerate(tape.ops) if op.phase is Phase.BETWEEN)
    assert list(baseline_curve(made)[:inside]) == list(baseline_curve(tape)[:inside])
    assert list(floor_curve(made)[:inside]) == list(floor_curve(tape)[:inside])
    assert sum(op.time_s for op in made.ops) == pytest.approx(sum(op.time_s for op in tape.ops))
    assert made.values[:inside] == tuple(
        replace(value, birth=now.birth, death=now.death)
        for value, now in zip(tape.values[:inside], made.values, strict=False)
    ), "the same values under the same numbers"


def test_another_network_still_parts() -> None:
    other = loaded(8)
    ops = (*other.ops[:3], replace(other.ops[3], name="aten.gelu"), *other.ops[4:])
    with pytest.raises(PlanMismatch, match=r"part at op 3: .*counts as one op"):
        Scale.of(loaded(4), replace(other, ops=ops), 4, 8)


# By hand: op 0 forward, 1 backward, 2 update, 3 to 5 loading, 6 an op of the step, 7 loading.
OPS = (
    Op("forward", "", Phase.FORWARD, 1.0, (0, 1), (2,)),
    Op("backward", "", Phase.BACKWARD, 1.0, (2,), (3,)),
    Op("update", "", Phase.BETWEEN, 1.0, (3,), (1,)),
    Op("read", "", Phase.BETWEEN, 1.0, (), (4,), scratch_bytes=7),
    Op("read", "", Phase.BETWEEN, 1.0, (), (5,)),
    Op("stack", "", Phase.BETWEEN, 1.0, (4, 5), (6,)),
    Op("first", "", Phase.BETWEEN, 1.0, (1, 6), (7,)),
    Op("read", "", Phase.BETWEEN, 1.0, (), (8,)),
)
VALUES = (
    Value(0, Kind.INPUT, 100, -1, 4, idle=(Stretch(1, 4), Stretch(4, 5)), movable=True),
    Value(1, Kind.PARAMETER, 1000, -1, 8, idle=(Stretch(7, 0), Stretch(4, 6, held_until=5)), movable=True),
    Value(2, Kind.ACTIVATION, 10, 0, 1, saved=0, saved_at=0, recipe=(0,), sources=()),
    Value(3, Kind.GRADIENT, 1000, 1, 8),
    Value(4, Kind.ACTIVATION, 50, 3, 5),
    Value(5, Kind.ACTIVATION, 50, 4, 5),
    Value(6, Kind.ACTIVATION, 100, 5, 8),
    Value(7, Kind.ACTIVATION, 10, 6, 8, recipe=(5, 6), sources=(6,)),
    Value(8, Kind.ACTIVATION, 20, 7, 8),
)
TAPE = Tape(OPS, VALUES, 5, "cpu", "2.13")


def test_what_is_folded() -> None:
    made = fold(TAPE)
    assert names(made) == ["forward", "backward", "update", NAME, "first", NAME]
    assert [op.time_s for op in made.ops] == [1, 1, 1, 3, 1, 1]
    assert made.ops[4].reads == (1, 4)
    assert made.ops[5].writes == (6,)
    lives = [(value.kind, value.size_bytes, value.birth, value.death) for value in made.values]
    assert lives[0] == (Kind.INPUT, 100, -1, 3)
    assert lives[4:] == [
        (Kind.INPUT, 100, 3, 6),
        (Kind.ACTIVATION, 10, 4, 6),
        (Kind.OTHER, 20, 5, 6),
    ]
    # At its most, with both samples and the batch; the batch before and the new one are values.
    assert [int(there) for there in baseline_curve(made)] == [
        *(int(there) for there in baseline_curve(TAPE)[:3]),
        int(baseline_curve(TAPE)[3:6].max()),
        *(int(there) for there in baseline_curve(TAPE)[6:]),
    ]


def test_idle_stretches_only_get_shorter_and_recipes_need_their_ops() -> None:
    made = fold(TAPE)
    assert made.values[0].idle == (Stretch(1, 3),), "what begins and ends inside of loading is nowhere"
    assert made.values[1].idle == (Stretch(5, 0),), "and what ends with it has no op left"
    assert made.values[2].recipe == (0,)
    assert (made.values[5].recipe, made.values[5].sources) == ((), ())


def test_places_of_either_tape_are_places_in_both() -> None:
    """One loads before its first update, too, and keeps something for good."""
    early = Op("read", "", Phase.BETWEEN, 1.0, (), (9,))
    ops = (*OPS[:2], early, *OPS[2:])
    values = tuple(
        replace(
            value,
            birth=value.birth + (value.birth >= 2),
            death=value.death + (value.death >= 2),
            idle=(),
            recipe=(),
            sources=(),
        )
        for value in VALUES
    )
    other = Tape(ops, (*values, Value(9, Kind.ACTIVATION, 30, 2, 9)), 5, "cpu", "2.13")
    pair = folded(TAPE, other)
    assert pair is not None
    assert names(pair[0]) == names(pair[1]) == [
        *("forward", "backward", NAME, "update", NAME, "first", NAME)
    ]  # fmt: skip
    match(*pair)
    assert [int(baseline_curve(tape).max()) for tape in pair] == [peak_bytes(TAPE), peak_bytes(other)]


def test_no_data_loading_nothing_to_fold() -> None:
    ops = tuple(replace(op, phase=Phase.FORWARD) for op in OPS)
    assert folded(replace(TAPE, ops=ops), replace(TAPE, ops=ops)) is None
