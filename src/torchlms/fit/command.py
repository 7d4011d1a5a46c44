"""Command: ``torchlms fit`` without the command line: gather, answer, and say so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchlms.fit.answer import answer
from torchlms.fit.question import gather
from torchlms.fit.recording import described
from torchlms.fit.result import result_json
from torchlms.fit.text import CURVE_COLUMNS, LARGEST_COLUMNS, basis, curve_rows, largest_rows, sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchlms.fit.question import Question

    Write = Callable[[str], None]
    WriteTable = Callable[[Sequence[str], Sequence[Sequence[str]]], None]


def fit(question: Question, write: Write, write_table: WriteTable) -> dict[str, Any]:
    """Answer ``question``, and say the answer; what is returned is for JSON.

    A step that does not fit is an answer like any other, not an error.
    """
    evidence = gather(question, write)
    for item in evidence.recordings:
        write(described(item))
    found = answer(question, evidence)
    write(f"{sentence(found)}.")
    write(f"({basis(found)})")
    if found.points is not None:
        write_table(CURVE_COLUMNS, curve_rows(found.points))
    if found.largest is not None:
        write_table(LARGEST_COLUMNS, largest_rows(found.largest))
    for note in found.notes:
        write(f"note: {note}.")
    return result_json(found)
