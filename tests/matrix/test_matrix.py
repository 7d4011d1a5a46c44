"""Every row leaves plain PyTorch's bits, or the error that it says, and docs/loops.md says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sessions import slow_disk

from tests.matrix.matrix import GROUPS, ROWS
from tests.matrix.row import WAYS, Row
from tests.matrix.table import committed, is_of_this_torch
from tests.matrix.trial import tried

Found = "dict[tuple[str, str], str] | None"


def _marks(row: Row, way: str) -> list[pytest.MarkDecorator]:
    slow = [pytest.mark.slow] if WAYS[way].get("recompute") else []  # sets of drops take long to search
    if way not in row.wrong:
        return slow
    return [*slow, pytest.mark.xfail(strict=True, reason=row.wrong[way])]


def each_row_each_way() -> list[Any]:
    """What is known to go wrong fails strictly: the day it works, its row has to say so."""
    return [
        pytest.param(
            row,
            way,
            id=f"{row.name}-{way}",
            marks=_marks(row, way),
        )
        for row in ROWS
        for way in WAYS
    ]


@pytest.mark.filterwarnings("error:::torchlms")  # whoever trains has done nothing to be warned of
@pytest.mark.parametrize(("row", "way"), each_row_each_way())
def test_row(row: Row, way: str, spill_dir: Path, found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    if WAYS[way].get("recompute"):
        slow_disk(monkeypatch)
    if found is not None:
        found[row.name, way] = f"wrong: {row.wrong.get(way, 'its test failed')}"
    said = tried(row, WAYS[way], spill_dir)
    if found is not None:
        found[row.name, way] = said
    elif is_of_this_torch():
        assert committed()[row.name, way] == said, "run `make loops`"


def test_the_committed_table_lists_exactly_these_rows(found: Found) -> None:
    if found is not None:
        pytest.skip("the table is written when all rows have run")
    assert list(committed()) == [(row.name, way) for row in ROWS for way in WAYS]


def test_names_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) == sum(len(rows) for rows in GROUPS.values())
