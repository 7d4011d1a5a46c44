"""Rules: which pattern decides, and what is said of a bad one."""

from __future__ import annotations

import pytest
from tapes import MIB, resnet

from torchlms.core.record import from_json, to_json
from torchlms.core.rules import Copies, Rules, Verdict, leavers, stayers, unmatched
from torchlms.core.tape import Kind, Op, Phase, Value
from torchlms.errors import BadOption


def _value(module: str = "layer1.0.conv1", op: str = "aten.relu.default") -> Value:
    return Value(0, Kind.ACTIVATION, MIB, 0, 3, module=module, op=op, movable=True)


def test_free_without_a_rule() -> None:
    assert Rules().judge(_value()) == (Verdict.FREE, "")


@pytest.mark.parametrize("pattern", ["layer1", "layer1.0", "layer1.*", "*.conv1", "layer[12]"])
def test_a_module_pattern_matches_the_module_and_what_is_inside(pattern: str) -> None:
    verdict, why = Rules(keep_modules=(pattern,)).judge(_value())
    assert verdict is Verdict.KEEP
    assert why == f"keep_modules {pattern!r}"


@pytest.mark.parametrize("pattern", ["layer", "conv1", "Layer1", "layer1.0.conv"])
def test_a_module_pattern_is_not_a_substring(pattern: str) -> None:
    assert Rules(keep_modules=(pattern,)).judge(_value())[0] is Verdict.FREE


def test_an_op_pattern() -> None:
    assert Rules(move_ops=("aten.relu*",)).judge(_value())[0] is Verdict.MOVE
    assert Rules(move_ops=("aten.relu",)).judge(_value())[0] is Verdict.FREE


def test_keep_wins() -> None:
    assert Rules(keep_ops=("aten.*",), move_modules=("layer1",)).judge(_value())[0] is Verdict.KEEP


def _reader(module: str, name: str) -> Op:
    return Op(name, module, Phase.BACKWARD, 0.0, (0,), ())


READERS = (_reader("layer1.0.bn1", "aten.native_batch_norm.default"), _reader("head", "aten.mm.default"))


@pytest.mark.parametrize(
    ("rules", "verdict", "why"),
    [
        (Rules(only_modules=("layer1",)), Verdict.FREE, ""),
        (Rules(only_modules=("layer2", "head")), Verdict.KEEP, "only_modules"),
        (Rules(only_modules=("layer1",), only_ops=("aten.gelu*",)), Verdict.KEEP, "only_ops"),
        (Rules(keep_read_by=("aten.mm*",)), Verdict.KEEP, "keep_read_by 'aten.mm*'"),
        (Rules(keep_read_by=("aten.cat*",)), Verdict.FREE, ""),
        (Rules(keep_read_in=("head",)), Verdict.KEEP, "keep_read_in 'head'"),
        (Rules(only_read_in=("layer1",)), Verdict.FREE, ""),
        (Rules(only_read_in=("stem",)), Verdict.KEEP, "only_read_in"),
        (Rules(only_read_by=("aten.mm*",), move_ops=("aten.relu*",)), Verdict.MOVE, "move_ops 'aten.relu*'"),
        (Rules(only_read_by=("aten.cat*",), move_ops=("*",)), Verdict.KEEP, "only_read_by"),
    ],
)
def test_others_only_and_by_reader(rules: Rules, verdict: Verdict, why: str) -> None:
    assert rules.judge(_value(), READERS) == (verdict, why)


def test_readers_are_found_on_the_tape() -> None:
    tape = resnet(2)
    reading = {value for op in tape.ops if op.name == "aten.relu" for value in op.reads}
    everything = set(leavers(Rules(), tape))
    assert set(leavers(Rules(keep_read_by=("aten.relu",)), tape)) == everything - reading
    assert set(leavers(Rules(only_read_by=("aten.relu",)), tape)) == everything & reading
    assert everything & reading
    assert everything - reading


def test_the_largest_of_those_idle_long_enough() -> None:
    tape = resnet(4)
    sizes = {value.id: value.size_bytes for value in tape.values}
    everything = leavers(Rules(), tape)
    few = leavers(Rules(most_values=3), tape)
    assert len(few) == 3
    assert min(sizes[value] for value in few) >= max(sizes[value] for value in everything if value not in few)
    idle = {
        value.id: max(stretch.stop - stretch.start for stretch in value.idle)
        for value in tape.values
        if value.idle
    }
    long = leavers(Rules(min_idle_ops=10), tape)
    assert set(long) == {value for value in everything if idle[value] >= 10}
    assert 0 < len(long) < len(everything)
    assert leavers(Rules(most_values=0), tape) == {}
    demanded = leavers(Rules(most_values=0, move_ops=("*",)), tape)
    assert set(demanded.values()) == {"move_ops '*'"}


def test_which_copies_wait() -> None:
    assert [(Rules(copies=name).waits_out, Rules(copies=name).within_ops) for name in Copies] == [
        (False, None),
        (True, None),
        (False, 0),
        (True, 0),
    ]
    assert Rules(reload_within_ops=7).within_ops == 7


def test_patterns_that_match_nothing_are_reported() -> None:
    rules = Rules(keep_modules=("layer1", "layr2"), move_ops=("aten.conv*", "aten.gelu"))
    assert unmatched(rules, resnet()) == ("keep_modules 'layr2'", "move_ops 'aten.gelu'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ("a",)}, "unknown rule 'keep': did you mean 'keep_ops'"),
        ({"keep_module": "layer1"}, "unknown rule 'keep_module': did you mean 'keep_modules'?"),
        ({"keep_modules": 5}, "keep_modules must be a pattern, or a list of them"),
        ({"move_ops": (1,)}, "move_ops must be a pattern, or a list of them"),
        ({"move_ops": ("",)}, "empty pattern"),
        ({"min_bytes": -1}, "min_bytes must be a number of bytes"),
        ({"min_bytes": 1.5}, "min_bytes must be a number of bytes"),
        ({"min_bytes": True}, "min_bytes must be a number of bytes"),
        ({"most_values": -1}, "most_values must be a number of values"),
        ({"min_idle_ops": None}, "min_idle_ops must be a number of ops"),
        ({"reload_ahead_ops": 5, "reload_within_ops": 3}, "no copy back could begin in time"),
        ({"copies": "sync"}, "copies must be one of 'overlap', 'wait out'"),
        ({"only_read_by": {"aten"}}, "only_read_by must be a pattern, or a list of them"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        Rules.read(options)


def test_read_and_round_trip() -> None:
    rules = Rules.read({"keep_modules": ["stem"], "min_bytes": 0, "copies": "wait", "most_values": 9})
    assert rules == Rules(keep_modules=("stem",), min_bytes=0, copies=Copies.WAIT, most_values=9)
    assert from_json(Rules, to_json(rules)) == rules


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (Rules(keep_ops=("aten.relu*",)), "keep_ops 'aten.relu*'"),
        (Rules(only_ops=("aten.linear",)), "only_ops"),
        (Rules(min_idle_ops=1000), "min_idle_ops 1000"),
        (Rules(most_values=0), "most_values 0"),
    ],
)
def test_what_a_rule_keeps_is_named_with_the_rule(rules: Rules, said: str) -> None:
    tape = resnet(12)
    leave, stay = leavers(rules, tape), stayers(rules, tape)
    assert stay
    assert set(stay.values()) == {said}
    assert not leave.keys() & stay.keys()
    assert leave.keys() | stay.keys() == leavers(Rules(), tape).keys()
    assert stayers(Rules(), tape) == {}
