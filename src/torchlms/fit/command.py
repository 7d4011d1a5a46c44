"""Command: ``torchlms fit`` without the command line: gather, answer, and say so."""

from __future__ import annotations

import json
from pathlib import Path
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

STDOUT = Path("-")


def fit(question: Question, write: Write, write_table: WriteTable) -> dict[str, Any]:
    """Answer ``question``; the JSON, which is also written where ``json_path`` says.

    With ``json_path`` of ``-`` the JSON is all that is written. A step that does not fit is an answer
    like any other, not an error.
    """
    quiet = question.json_path == STDOUT
    evidence = gather(question, _nothing if quiet else write)
    if not quiet:
        for item in evidence.recordings:
            write(described(item))
    found = answer(question, evidence)
    result = result_json(found)
    if quiet:
        write(json.dumps(result, indent=1))
        return result
    write(f"{sentence(found)}.")
    write(f"({basis(found)})")
    if found.points is not None:
        write_table(CURVE_COLUMNS, curve_rows(found.points))
    if found.largest is not None:
        write_table(LARGEST_COLUMNS, largest_rows(found.largest))
    for note in found.notes:
        write(f"note: {note}.")
    if question.json_path is not None:
        question.json_path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _nothing(line: str) -> None:
    del line
