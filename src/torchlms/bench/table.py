"""Table: results side by side, as rows of text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from torchlms.memory.limits import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOTE_WIDTH = 100  # the JSON has the whole line

COLUMNS = ("way", "rate", "of plain", "step", "peak", "reserved", "host", "note")


def comparison_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row per result; ``of plain`` compares median steps with those of the way ``none``."""
    plain = (r["step_s"]["median"] for r in results if r["way"] == "none" and "step_s" in r)
    plain_s = next(plain, None)
    return [_row(result, plain_s) for result in results]


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text in aligned columns, for files and pipes."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _row(result: dict[str, Any], plain_s: float | None) -> list[str]:
    if "error" in result:
        return [result["way"], "-", "-", "-", "-", "-", "-", textwrap.shorten(result["error"], _NOTE_WIDTH)]
    step_s = result["step_s"]["median"]
    return [
        result["way"],
        f"{result['items_per_s']:.1f} {result['unit']}/s",
        f"{plain_s / step_s:.3f}" if plain_s else "-",
        f"{step_s * 1e3:.1f} ms",
        _size(result["peak_device_bytes"]),
        _size(result["peak_reserved_bytes"]),
        _size(result["peak_host_bytes"]),
        "" if result.get("cap_bytes") is None else f"cap {format_bytes(result['cap_bytes'])}",
    ]


def _size(size_bytes: int) -> str:
    return format_bytes(size_bytes) if size_bytes else "-"
