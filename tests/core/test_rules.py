"""Rules: which pattern decides, and what is said of a bad one."""

from __future__ import annotations

import pytest
from tapes import MIB, resnet

from torchlms.core.record import from_json, to_json
from torchlms.core.rules import Rules, Verdict, unmatched
from torchlms.core.tape import Kind, Value
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


def test_patterns_that_match_nothing_are_reported() -> None:
    rules = Rules(keep_modules=("layer1", "layr2"), move_ops=("aten.conv*", "aten.gelu"))
    assert unmatched(rules, resnet()) == ("keep_modules 'layr2'", "move_ops 'aten.gelu'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ("a",)}, "unknown rule 'keep'; the rules are keep_modules"),
        ({"keep_modules": "layer1"}, "keep_modules must be a list of patterns"),
        ({"move_ops": (1,)}, "move_ops must be a list of patterns"),
        ({"move_ops": ("",)}, "empty pattern"),
        ({"min_bytes": -1}, "min_bytes must be a number of bytes"),
        ({"min_bytes": 1.5}, "min_bytes must be a number of bytes"),
        ({"min_bytes": True}, "min_bytes must be a number of bytes"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        Rules.read(options)


def test_read_and_round_trip() -> None:
    rules = Rules.read({"keep_modules": ["stem"], "min_bytes": 0})
    assert rules == Rules(keep_modules=("stem",), min_bytes=0)
    assert from_json(Rules, to_json(rules)) == rules
