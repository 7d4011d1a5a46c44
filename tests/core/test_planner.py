"""The planner: never over budget, never beaten by much, and what it says when it cannot."""

from __future__ import annotations

import random
import time
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import brute
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from tapes import GIB, MIB, Network, chain, cpu, gpu, resnet, transformer, unet

from torchlms.core import joint
from torchlms.core.calibrate import Rates, foretold
from torchlms.core.curve import peak_bytes
from torchlms.core.headroom import NO_ELBOW, Elbow
from torchlms.core.plan import Budget, Choice, Plan
from torchlms.core.planned import SLOWER
from torchlms.core.planner import lower_bound, plan
from torchlms.core.rules import Rules
from torchlms.core.simulate import baseline_curve, floor_curve, memory_curve, simulate, smallest_budget
from torchlms.core.tape import Kind, Op, Phase, Stretch, Tape, Value
from torchlms.core.validate import validate
from torchlms.errors import BudgetTooSmall, HostBudgetTooSmall

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.core.machine import Machine

LOTS = 1 << 50
NETWORKS = {
    "chain": chain(),
    "resnet": resnet(8),
    "laps": resnet(4, laps=3),
    "unet": unet(),
    "gpt": transformer(6),
}
SHARES = [0.9, 0.6, 0.3, 0.1, 0.0]


def _budget(tape: Tape, share: float, host_bytes: int = LOTS, disk_bytes: int = LOTS) -> Budget:
    """``share`` of the way from the smallest budget to no need for one."""
    least, most = smallest_budget(tape), int(baseline_curve(tape).max())
    return Budget(least + int(share * (most - least)), host_bytes, disk_bytes)


@cache
def _planned(name: str, share: float) -> Plan:
    return plan(NETWORKS[name], gpu(), _budget(NETWORKS[name], share))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, share: float) -> None:
    tape, machine = NETWORKS[name], gpu()
    budget = _budget(tape, share)
    made = _planned(name, share)
    assert validate(tape, made, machine) == []
    assert made.predicted.peak_device_bytes <= budget.device_bytes
    assert made.smallest_bytes == smallest_budget(tape)
    assert made.predicted.step_s >= lower_bound(tape, machine, budget) - 1e-9
    assert all(decision.reason for decision in made.decisions)
    timeline = simulate(tape, machine, made.decisions)
    assert timeline.step_s == pytest.approx(made.predicted.step_s, rel=1e-12)
    assert made.predicted.arena_bytes <= 1.02 * made.predicted.bytes_out


@pytest.mark.parametrize("name", NETWORKS)
def test_a_smaller_budget_is_not_faster(name: str) -> None:
    """By more than the search may miss."""
    steps_s = [_planned(name, share).predicted.step_s for share in SHARES]
    for larger, smaller in pairwise(steps_s):
        assert smaller >= larger * 0.98


def test_when_everything_fits_nothing_moves() -> None:
    made = plan(chain(), gpu(), Budget(80 * GIB, 0, 0))
    assert made.decisions == ()
    assert made.predicted.stall_s == 0


@pytest.mark.parametrize("name", ["resnet", "gpt", "unet"])
def test_copies_that_are_a_little_slower_cost_no_more_than_they_must(name: str) -> None:
    """Values that idle longer move where that costs nothing; [Note: Slower copies]."""
    tape, machine = NETWORKS[name], gpu(link=20e9)
    slowed_s = {SLOWER: 0.0, 1.0: 0.0}
    for share in (0.6, 0.7, 0.8, 0.9):
        made = {copies: plan(tape, machine, _budget(tape, share), copies=copies) for copies in slowed_s}
        assert made[SLOWER].predicted.step_s <= 1.002 * made[1.0].predicted.step_s
        for copies, planned in made.items():
            slowed_s[copies] += foretold(tape, machine, planned, Rates(copies=0.85)).step_s
    assert slowed_s[SLOWER] < 0.99 * slowed_s[1.0]


def test_they_are_counted_on_unless_it_is_said_otherwise() -> None:
    tape, budget = NETWORKS["gpt"], _budget(NETWORKS["gpt"], 0.8)
    made = {copies: plan(tape, gpu(link=20e9), budget, copies=copies).decisions for copies in (SLOWER, 1.0)}
    assert plan(tape, gpu(link=20e9), budget).decisions == made[SLOWER] != made[1.0]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_where_the_step_waits_nothing_is_lost_by_counting_on_them(data: st.DataObject) -> None:
    """Then the plan for copies as fast as the machine's was made, too, and the better one is taken."""
    tape = data.draw(strategies.tapes())
    budget = _budget(tape, data.draw(st.floats(0.05, 0.9)), disk_bytes=0)
    machine = gpu(link=data.draw(st.sampled_from((2e9, 10e9, 50e9))))
    both_s = []
    for copies in (SLOWER, 1.0):
        made = plan(tape, machine, budget, copies=copies)
        slowed = foretold(tape, machine, made, Rates(copies=SLOWER))
        both_s.append(made.predicted.step_s + slowed.step_s + 4e-5 * len(made.moves))
    assert both_s[0] <= both_s[1] * 1.001


def test_a_fast_link_costs_nothing() -> None:
    made = plan(chain(), gpu(link=500e9), _budget(chain(), 0.3))
    assert made.predicted.stall_s <= 0.001 * made.predicted.compute_s


def test_the_same_input_gives_the_same_plan() -> None:
    tape = unet()
    one, other = (plan(tape, gpu(), _budget(tape, 0.2)) for _ in range(2))
    assert one.decisions == other.decisions


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_tapes(data: st.DataObject) -> None:
    tape = data.draw(strategies.tapes(max_values=6))
    machine = data.draw(strategies.machines())
    least = smallest_budget(tape)
    headroom_bytes = data.draw(st.integers(0, 10)) * 1000
    spare = data.draw(st.integers(0, int(baseline_curve(tape).max()) - least))
    budget = Budget(least + headroom_bytes + spare, LOTS if machine.link else 0, LOTS)
    elbow = data.draw(st.sampled_from([NO_ELBOW, Elbow(flying=0.5), Elbow(new=0.5), Elbow(2.0, 2.0)]))
    made = plan(tape, machine, budget, headroom_bytes=headroom_bytes, elbow=elbow)
    assert validate(tape, made, machine) == []
    assert made.predicted.peak_device_bytes <= budget.device_bytes - headroom_bytes
    assert made.smallest_bytes == least + headroom_bytes
    bound_s = lower_bound(tape, machine, budget)
    assert made.predicted.step_s >= bound_s * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_tapes_on_little_host_memory(data: st.DataObject) -> None:
    tape = data.draw(strategies.tapes(max_values=6))
    machine = data.draw(strategies.machines(link=True))
    budget = Budget(smallest_budget(tape), data.draw(st.integers(0, 20_000_000)), LOTS)
    try:
        made = plan(tape, machine, budget)
    except HostBudgetTooSmall as error:
        missing_bytes = error.missing_bytes
        assert missing_bytes > 0
        return
    assert validate(tape, made, machine) == []
    assert made.predicted.arena_bytes <= budget.host_bytes or not made.moves


def _small_tape(rng: random.Random, count: int) -> Tape:
    ops = tuple(
        Op(f"op{index}", "", Phase.FORWARD, rng.choice([0.3, 1.0, 2.0]) * rng.random(), (), ())
        for index in range(count)
    )
    values = []
    for index in range(3):
        start, stop = sorted(rng.sample(range(1, count), 2))
        size_bytes = rng.randint(100_000, 2_000_000)
        birth, death = rng.randint(-1, start - 1), rng.randint(stop, count - 1)
        values.append(
            Value(index, Kind.ACTIVATION, size_bytes, birth, death, (Stretch(start, stop),), movable=True)
        )
    return Tape(ops, tuple(values), 0, "cuda", "2.13")


def ratios_to_brute_force(machine: Machine, choice: Choice, cases: int, *, seed: int = 0) -> list[float]:
    """Planned over best step time, for random small tapes that do not fit."""
    rng = random.Random(seed)
    ratios = []
    while len(ratios) < cases:
        tape = _small_tape(rng, rng.randint(5, 8))
        least, most = smallest_budget(tape), int(baseline_curve(tape).max())
        if least == most:
            continue
        budget = Budget(rng.randint(least, most - 1), LOTS if machine.link else 0, LOTS)
        best_s = brute.best_step_s(tape, machine, budget.device_bytes, choice)
        assert best_s is not None
        ratios.append(plan(tape, machine, budget, Rules(min_bytes=0)).predicted.step_s / best_s)
    return ratios


@pytest.mark.parametrize(
    ("machine", "choice"),
    [
        (gpu(link=1e6, latency_s=1e-3), Choice.HOST),
        (gpu(link=4e6, share=0.6, latency_s=1e-3), Choice.HOST),
        (cpu(disk=1e6), Choice.DISK),
    ],
)
def test_close_to_brute_force(machine: Machine, choice: Choice) -> None:
    ratios = np.array(ratios_to_brute_force(machine, choice, cases=25))
    assert (ratios >= 1 - 1e-9).all()
    assert (ratios <= 1.05).mean() >= 0.95
    assert ratios.max() <= 1.5


@settings(max_examples=40, deadline=None)
@given(strategies.tapes(max_ops=6, max_values=2), strategies.machines(link=True), st.floats(0, 1))
def test_the_lower_bound_is_one(tape: Tape, machine: Machine, share: float) -> None:
    budget = _budget(tape, share)
    best_s = brute.best_step_s(tape, machine, budget.device_bytes)
    assert best_s is not None
    assert lower_bound(tape, machine, budget) <= best_s * (1 + 1e-9)


@pytest.mark.parametrize("name", ["resnet", "unet"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_elbow_room_is_left_beside_what_flies_and_what_is_new(name: str, share: float) -> None:
    tape, machine = NETWORKS[name], gpu()
    budget = _budget(tape, share)
    elbow = Elbow(flying=0.2, new=0.15)
    made = plan(tape, machine, budget, elbow=elbow)
    floor = floor_curve(tape)
    flying = np.zeros(len(tape.ops))
    for decision in made.moves:
        value = tape.values[decision.value]
        stretch = value.idle[decision.stretch]
        flying[stretch.start : decision.release_op] += value.size_bytes
        flying[decision.reload_op : stretch.stop] += value.size_bytes
    new = np.array([float(op.scratch_bytes) for op in tape.ops])
    for value in tape.values:
        if value.birth >= 0:
            new[value.birth] += value.size_bytes
    room = budget.device_bytes - memory_curve(tape, made.decisions)
    wanted = elbow.flying * flying + np.minimum(elbow.new * new, budget.device_bytes - floor)
    short = room < wanted - 1
    # Only a copy back that is needed at once may be short of room: there is nothing to wait for.
    needed = {tape.values[move.value].idle[move.stretch].stop - 1 for move in made.moves}
    assert set(np.flatnonzero(short).tolist()) <= needed
    assert (memory_curve(tape, plan(tape, machine, budget).decisions) > budget.device_bytes - wanted).any()


def test_below_the_floor() -> None:
    tape = resnet(8)
    least = smallest_budget(tape)
    with pytest.raises(BudgetTooSmall) as caught:
        plan(tape, gpu(), Budget(least - 1, LOTS, LOTS))
    assert caught.value.smallest_bytes == least
    message = str(caught.value)
    assert "smallest budget" in message
    assert f"{least} bytes" in message
    assert "aten.convolution_backward in layer1.1.conv2" in message
    assert plan(tape, gpu(), Budget(least, LOTS, LOTS)).predicted.peak_device_bytes <= least


def test_headroom_is_part_of_the_smallest_budget() -> None:
    tape = chain()
    with pytest.raises(BudgetTooSmall, match="headroom") as caught:
        plan(tape, gpu(), Budget(smallest_budget(tape), LOTS, LOTS), headroom_bytes=MIB)
    assert caught.value.smallest_bytes == smallest_budget(tape) + MIB


def test_rules_raise_the_floor_and_the_error_says_so() -> None:
    tape = chain()
    with pytest.raises(BudgetTooSmall, match="Without the rules it is") as caught:
        plan(tape, gpu(), _budget(tape, 0.0), Rules(keep_modules=("layer*",)))
    least = caught.value.smallest_bytes
    made = plan(tape, gpu(), Budget(least, LOTS, LOTS), Rules(keep_modules=("layer*",)))
    assert made.smallest_bytes == least
    assert all(tape.values[move.value].module == "" for move in made.moves)


def test_move_rules_move_also_when_everything_fits() -> None:
    tape = resnet(4)
    made = plan(tape, gpu(), Budget(80 * GIB, LOTS, LOTS), Rules(move_ops=("aten.relu",), min_bytes=GIB))
    moved = {move.value for move in made.moves}
    assert moved == {value.id for value in tape.values if value.op == "aten.relu" and value.movable}
    assert all(move.reason.startswith("rule move_ops 'aten.relu'") for move in made.moves)
    assert validate(tape, made, gpu()) == []


def test_small_values_stay_unless_they_must_go() -> None:
    tape = resnet(8)
    rules = Rules(min_bytes=128 * MIB)
    sizes = [
        tape.values[move.value].size_bytes for move in plan(tape, gpu(), _budget(tape, 0.8), rules).moves
    ]
    assert min(sizes) >= 128 * MIB
    made = plan(tape, gpu(), _budget(tape, 0.0), rules)
    assert min(tape.values[move.value].size_bytes for move in made.moves) < 128 * MIB


def mostly_small() -> Tape:
    """Most of what can leave is small for a budget of 74 GiB, beneath a few larger values."""
    network = Network()
    last = network.layer("data", 4 * MIB, 1e-3)
    for count, size_bytes in ((40, 30 * MIB), (12, 64 * MIB), (4, 4 * MIB)):
        for _ in range(count):
            last = network.layer("aten.linear", size_bytes, 3e-3, last)
    return network.tape(resident_bytes=74 * GIB)


@pytest.mark.parametrize("over_bytes", [500 * MIB, 600 * MIB])
def test_small_values_leave_where_large_ones_alone_would_stall(over_bytes: int) -> None:
    tape = mostly_small()
    budget = Budget(peak_bytes(tape) - over_bytes, 200 * GIB, 0)
    made = plan(tape, gpu(link=12e9), budget)
    assert min(tape.values[move.value].size_bytes for move in made.moves) < budget.device_bytes / 2048
    assert made.predicted.step_s < 1.002 * made.predicted.compute_s


def test_small_values_leave_where_host_memory_holds_no_large_one() -> None:
    tape = mostly_small()
    made = plan(tape, gpu(), Budget(peak_bytes(tape) - 20 * MIB, 40 * MIB, 0))
    assert [tape.values[move.value].size_bytes for move in made.moves] == [30 * MIB]


def test_few_large_values_leave_rather_than_many_small_ones() -> None:
    tape = mostly_small()
    made = plan(tape, gpu(), Budget(peak_bytes(tape) - 500 * MIB, 200 * GIB, 0))
    assert {tape.values[move.value].size_bytes for move in made.moves} == {64 * MIB}


def test_no_host_memory_and_no_disk() -> None:
    tape = chain()
    with pytest.raises(HostBudgetTooSmall, match="lack") as caught:
        plan(tape, gpu(), _budget(tape, 0.5, host_bytes=100 * MIB, disk_bytes=0))
    needed = plan(tape, gpu(), _budget(tape, 0.5)).predicted.arena_bytes
    assert 0 < caught.value.missing_bytes <= needed
    with pytest.raises(HostBudgetTooSmall):
        plan(tape, gpu(disk=0), _budget(tape, 0.5, host_bytes=100 * MIB))
    with pytest.raises(HostBudgetTooSmall):
        plan(tape, cpu(), _budget(tape, 0.5, disk_bytes=100 * MIB))


def test_host_memory_first_then_disk_for_the_longest_idle() -> None:
    tape = chain()
    made = plan(tape, gpu(), _budget(tape, 0.3, host_bytes=512 * MIB))
    assert validate(tape, made, gpu()) == []
    by_choice = {
        choice: [tape.values[move.value].idle[move.stretch] for move in made.moves if move.choice is choice]
        for choice in (Choice.HOST, Choice.DISK)
    }
    assert by_choice[Choice.HOST]
    assert by_choice[Choice.DISK]
    lengths = {choice: [idle.stop - idle.start for idle in idles] for choice, idles in by_choice.items()}
    assert min(lengths[Choice.DISK]) >= max(lengths[Choice.HOST])


def test_values_whose_every_stretch_wraps_stay() -> None:
    ops = tuple(Op(f"op{index}", "", Phase.FORWARD, 1.0, (), ()) for index in range(4))
    state = Value(0, Kind.STATE, MIB, -1, 4, (Stretch(2, 1),), movable=True)
    tape = Tape(ops, (state,), 0, "cuda", "2.13")
    assert smallest_budget(tape) == MIB
    with pytest.raises(BudgetTooSmall):
        plan(tape, gpu(), Budget(MIB - 1, LOTS, LOTS))


@settings(max_examples=30, deadline=None)
@given(strategies.tapes(wrapping=True))
def test_tapes_with_wrapping_values(tape: Tape) -> None:
    made = plan(tape, gpu(), Budget(smallest_budget(tape), LOTS, LOTS))
    assert validate(tape, made, gpu()) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_back_begin_when_they_are_told_to(name: str) -> None:
    tape, machine = NETWORKS[name], gpu()
    budget = _budget(tape, 0.6)
    stops = {value.id: [stretch.stop for stretch in value.idle] for value in tape.values}

    def distances(rules: Rules) -> list[int]:
        made = plan(tape, machine, budget, rules)
        assert validate(tape, made, machine) == []
        assert made.predicted.peak_device_bytes <= budget.device_bytes
        assert made.moves
        return [stops[move.value][move.stretch] - move.reload_op for move in made.moves]

    assert max(distances(Rules(min_bytes=0, reload_within_ops=2))) <= 2
    assert set(distances(Rules(min_bytes=0, copies="wait in"))) == {0}  # type: ignore[arg-type]
    # Just in time is later than that in each of these networks, and all have the memory to be early.
    assert min(distances(Rules(min_bytes=0))) < 8 <= min(distances(Rules(min_bytes=0, reload_ahead_ops=8)))


@pytest.mark.parametrize("make_plan", [plan, joint.plan])
def test_headroom_is_left_free(make_plan: Callable[..., Plan]) -> None:
    tape, machine = NETWORKS["resnet"], gpu()
    budget = _budget(tape, 0.6)
    spare_bytes = (budget.device_bytes - smallest_budget(tape)) // 2
    made = make_plan(tape, machine, budget, Rules(headroom_bytes=spare_bytes))
    assert made.predicted.peak_device_bytes <= budget.device_bytes - spare_bytes
    assert make_plan(tape, machine, budget, Rules()).predicted.peak_device_bytes > (
        budget.device_bytes - spare_bytes
    )
    with pytest.raises(BudgetTooSmall, match="of it headroom"):
        make_plan(tape, machine, budget, Rules(headroom_bytes=3 * spare_bytes))


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_out_that_are_waited_for(name: str) -> None:
    tape, machine = NETWORKS[name], gpu()
    budget = _budget(tape, 0.6)
    made = plan(tape, machine, budget, Rules(min_bytes=0, copies="wait out"))  # type: ignore[arg-type]
    assert validate(tape, made, machine) == []
    starts = [tape.values[move.value].idle[move.stretch].start for move in made.moves]
    assert [move.release_op for move in made.moves] == starts
    assert made.predicted.step_s >= plan(tape, machine, budget, Rules(min_bytes=0)).predicted.step_s


def test_no_more_values_leave_than_may() -> None:
    tape = NETWORKS["resnet"]
    budget = _budget(tape, 0.9)
    most = len(plan(tape, gpu(), budget, Rules(min_bytes=0)).moves)
    assert most > 2
    made = plan(tape, gpu(), budget, Rules(min_bytes=0, most_values=most))
    assert len(made.moves) <= most
    with pytest.raises(BudgetTooSmall, match="Without the rules it is"):
        plan(tape, gpu(), _budget(tape, 0.0), Rules(min_bytes=0, most_values=2))


@pytest.mark.parametrize(
    ("network", "share"),
    [
        (resnet, 0.25),
        (transformer, 0.0),
        *(
            pytest.param(network, share, marks=pytest.mark.more)
            for network, share in ((resnet, 0.5), (resnet, 0.0), (transformer, 0.5), (transformer, 0.25))
        ),
    ],
)
def test_ten_thousand_ops_in_two_seconds(network: Callable[[int], Tape], share: float) -> None:
    tape = network(500)
    assert len(tape.ops) >= 10_000
    took_s = []
    for _ in range(16):  # the best of some: the machine may be busy with something else
        started_s = time.process_time()
        made = plan(tape, gpu(), _budget(tape, share))
        took_s.append(time.process_time() - started_s)
        if took_s[-1] <= 2.0:
            break
    assert min(took_s) <= 2.0, took_s
    assert len(made.moves) > 500
    assert validate(tape, made, gpu()) == []
