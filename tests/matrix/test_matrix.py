"""Every row leaves plain PyTorch's bits, or the error that it says, and docs/loops.md says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sessions import slow_disk

from tests.matrix.matrix import GROUPS, ROWS
from tests.matrix.on_device import tried_on
from tests.matrix.row import WAYS, Row
from tests.matrix.table import committed, is_of_this_torch
from tests.matrix.trial import tried

Found = "dict[tuple[str, str], str] | None"


def each_row_each_way() -> list[Any]:
    return [
        pytest.param(
            row,
            way,
            id=f"{row.name}-{way}",
            # Sets of drops take long to search.
            marks=[pytest.mark.slow] if row.slow or WAYS[way].get("recompute") else [],
        )
        for row in ROWS
        for way in WAYS
    ]


@pytest.mark.filterwarnings("error:::torchlms")  # whoever trains has done nothing to be warned of
@pytest.mark.parametrize(("row", "way"), each_row_each_way())
def test_row(
    row: Row, way: str, device: str, spill_dir: Path, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why := row.unable():
        pytest.skip(why)
    if device != "cpu":
        try_on(device, row, way, spill_dir)
        return
    if WAYS[way].get("recompute"):
        slow_disk(monkeypatch)
    if found is not None:
        found[row.name, way] = "wrong: its test failed"
    said = tried(row, WAYS[way], spill_dir)
    if found is not None:
        found[row.name, way] = said
    elif is_of_this_torch():
        assert committed()[row.name, way] == said, "run `make loops`"


def try_on(device: str, row: Row, way: str, disk_dir: Path) -> None:
    """On a device the table is not compared: it says what happens on the CPU."""
    if WAYS[way].get("recompute"):
        pytest.skip("values are made again in tests/gpu: here no budget presses")
    if why := row.only_cpu or (row.refused and "refused on the CPU already") or row.any_mode:
        pytest.skip(why)
    tried_on(device, row, disk_dir)


def test_the_committed_table_lists_exactly_these_rows(found: Found) -> None:
    if found is not None:
        pytest.skip("the table is written when all rows have run")
    assert list(committed()) == [(row.name, way) for row in ROWS for way in WAYS]


def test_names_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) == sum(len(rows) for rows in GROUPS.values())
