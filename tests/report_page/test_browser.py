"""The page in a real browser: drawn, in the reader's scheme, at phone and desktop width, and at once.

Skipped without a Chromium; CONTRIBUTING.md says how to get one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("jinja2")

from tapes import gpu, resnet

from tests.report_page.browser import BROWSER, WHY_NOT, Browser, Seen
from tests.report_page.runs import run
from torchlms.fit.curve import curve
from torchlms.report_page.page import page
from torchlms.report_page.run import Run

pytestmark = pytest.mark.skipif(BROWSER is None, reason=WHY_NOT)

PHONE_PX, DESKTOP_PX = 390, 1400
MOST_BYTES = 2 << 20
MOST_MS = 2000
READER = (Path(__file__).parent / "reader.js").read_text()
STATE = {"dark"}  # said by the reader, and neither good nor bad


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@cache
def usual_page() -> str:
    one = run("host")
    assert one.plan is not None
    return page(one, curve(one.tape, one.machine, one.plan.budget, [one.plan.budget.device_bytes]))


def read(browser: Browser, text: str, folder: Path, width_px: int, *, dark: bool = False) -> Seen:
    """Opened and used as ``reader.js`` does; what holds for every page is checked."""
    sizes = re.findall(r'<td class="n" data-v="(\d+)">[\d.]+ [A-Za-z]+</td><td><i', text)
    use = READER.replace("SMALLEST", min(sizes, key=int)).replace("LARGEST", max(sizes, key=int))
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    seen = browser.look(path, width_px=width_px, height_px=2400, dark=dark, use=use)
    assert seen.complaints == []
    assert seen.loaded_ms < MOST_MS
    assert (seen.said["width"], seen.said["overflow"]) == (width_px, 0)
    assert [name for name, fine in seen.said.items() if fine is False and name not in STATE] == []
    return seen


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width_px", [PHONE_PX, DESKTOP_PX])
def test_it_is_drawn_and_can_be_used(width_px: int, dark: bool, browser: Browser, tmp_path: Path) -> None:
    seen = read(browser, usual_page(), tmp_path, width_px, dark=dark)
    paper = [int(part) for part in re.findall(r"\d+", seen.said["paper"])]
    assert seen.said["dark"] is dark
    assert (max(paper) < 60) is dark
    assert (min(paper) > 200) is not dark
    assert (seen.picture.width, seen.picture.corner) == (width_px, paper)
    assert seen.picture.colours > 200
    assert seen.picture.lines > 0.8
    assert seen.picture.coloured > 0.02


def test_a_step_of_ten_thousand_ops_is_there_at_once(browser: Browser, tmp_path: Path) -> None:
    tape = resnet(500)
    assert len(tape.ops) > 10_000
    text = page(Run(tape, gpu()))
    assert len(text.encode()) <= MOST_BYTES
    read(browser, text, tmp_path, PHONE_PX)


def test_what_is_wrong_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    """The eyes of these tests: a page that is blank, complains, fails and is slow."""
    path = tmp_path / "blank.html"
    path.write_text(
        "<!doctype html><script>console.error('alas'); const end = performance.now() + 300; "
        "while (performance.now() < end);"
        "nonsense()</script><div style='width: 2000px; height: 9px'>"
    )
    use = "({ overflow: document.documentElement.scrollWidth - innerWidth })"
    seen = browser.look(path, width_px=DESKTOP_PX, height_px=600, dark=True, use=use)
    assert len(seen.complaints) == 2
    assert "alas" in seen.complaints[0]
    assert "nonsense" in seen.complaints[1]
    assert seen.loaded_ms >= 300
    assert seen.said["overflow"] > 500
    assert (seen.picture.colours, seen.picture.lines) == (1, 0.0)
