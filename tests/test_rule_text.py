"""Rules on a command line: read as the API would have them, refused with the text that is wrong."""

from __future__ import annotations

import pytest

import torchlms
from torchlms.core.rules import Copies, Rules
from torchlms.errors import BadOption
from torchlms.rule_text import read_rules


def test_every_kind_of_rule() -> None:
    found = read_rules(
        [
            "keep_modules=stem, layer1.*",
            "min-bytes=4MiB",
            "most_values=30",
            "reload_within_ops=12",
            "copies=wait out",
            "headroom_bytes=1GiB",
            "recompute=true",
        ]
    )
    assert found is not None
    assert Rules.read(found) == Rules(
        keep_modules=("stem", "layer1.*"),
        min_bytes=4 << 20,
        most_values=30,
        reload_within_ops=12,
        copies=Copies.WAIT_OUT,
        headroom_bytes=1 << 30,
        recompute=True,
    )


def test_nothing_at_all_is_a_size() -> None:
    assert read_rules(["min_bytes=0", "headroom_bytes=0"]) == {"min_bytes": 0, "headroom_bytes": 0}


def test_sizes_in_a_dict_of_rules() -> None:
    lms = torchlms.LMS(budget="1GiB", rules={"headroom_bytes": "16MiB", "min_bytes": "1KiB"}, device="cpu")
    assert lms._options.rules == Rules(headroom_bytes=16 << 20, min_bytes=1 << 10)
    with pytest.raises(BadOption, match="headroom_bytes must be a number of bytes"):
        torchlms.LMS(budget="1GiB", rules={"headroom_bytes": -1}, device="cpu")


def test_no_rule() -> None:
    assert read_rules([]) is None
    assert read_rules([], recompute=False) == {"recompute": False}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["keep_modules"], "cannot read the rule 'keep_modules': write --rule name=value"),
        (["keep_modules="], "cannot read the rule"),
        (["keep=a"], "unknown rule 'keep'"),
        (["most_values=many"], "most_values needs a whole number, not 'many'"),
        (["min_bytes=4G"], "'4G'"),
        (["recompute=yes"], "true or false, not 'yes'"),
        (["copies=sync"], "copies must be one of"),
        (["keep_ops=a", "keep_ops=b"], "given twice"),
    ],
)
def test_what_cannot_be_read(texts: list[str], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        read_rules(texts)
