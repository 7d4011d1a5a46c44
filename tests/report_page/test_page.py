"""The page: complete, alone, and without errors in a browser."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")

from tapes import resnet, transformer

from tests.report_page.runs import NAMES, run
from torchlms.errors import NotSupported
from torchlms.report_page.page import page
from torchlms.report_page.run import Run

MOST_BYTES = 2 << 20
VOID = {"meta", "link", "input", "br"}
HEADINGS = [
    "Predicted and measured", "What went wrong", "Device memory over one step", "Off the device", "Queues",
    "Speed against budget", "Values and reasons", "Machine and settings",
]  # fmt: skip


class _Balanced(HTMLParser):
    """Fails where an element ends that did not begin, or begins and does not end."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} ends at {self.getpos()}"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_well_formed_and_asks_for_nothing(name: str) -> None:
    text = page(run(name))
    parser = _Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.seen.count("svg") >= 3
    assert not re.search(r"https?:|url\(|@import|<script[^>]*src=", text)
    assert len(text.encode()) <= MOST_BYTES


def test_every_section_is_there() -> None:
    found = re.findall(r"<h2>(.*?)</h2>", page(run("host")))
    assert found == HEADINGS
    assert [heading for heading in HEADINGS if heading not in page(run("planless"))] == [
        HEADINGS[0],
        HEADINGS[3],
    ]


def test_what_went_wrong_is_said() -> None:
    text = page(run("host"))
    assert "Convolutions starved: 1" in text
    assert "Room made at once: 3" in text
    assert text.index("Convolutions starved: 1") < text.index("Room made at once: 3")
    assert "Nothing ran" in page(run("planless"))


def test_a_long_step_stays_small() -> None:
    tape = resnet(700)
    assert len(tape.ops) > 14_000
    assert len(page(Run(tape, run("host").machine)).encode()) <= MOST_BYTES


def test_names_cannot_write_into_the_page() -> None:
    evil = "</script><b onclick=x>"
    tape = transformer(2)
    ops = tuple(replace(op, module=evil) for op in tape.ops)
    values = tuple(replace(value, module=evil) for value in tape.values)
    text = page(Run(replace(tape, ops=ops, values=values, model=evil), run("host").machine))
    assert evil not in text
    assert text.count("</script>") == 2


def test_without_jinja2_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(NotSupported, match=r"pip install '\.\[report\]' in a clone"):
        page(run("host"))
