"""The CPU as the device, as in tests/eager; `--write-loops`: docs/loops.md written from what was found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.eager.conftest import machine  # noqa: F401
from tests.matrix import table

pytest.register_assert_rewrite("tests.matrix.trial")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-loops", action="store_true", help=f"write {table.FILE.name} from this run")


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], str] | None]:
    """What the table is to say by row and way, or None when it is only compared with what it says."""
    # The option is unknown where this file is read too late to add one: there the table is not written.
    if not request.config.getoption("--write-loops", default=False):
        yield None
        return
    cells: dict[tuple[str, str], str] = {}
    yield cells
    table.FILE.write_text(table.written(cells))
