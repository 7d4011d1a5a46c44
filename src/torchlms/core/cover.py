"""Cover: which moves, taken in some order, bring every op under a limit, and no more of them than that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchlms.core.curve import occupancy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchlms.core.curve import Bytes
    from torchlms.core.moves import Move


def left_over(excess: Bytes, moves: Iterable[Move]) -> Bytes:
    """The excess at each op when each move is away from its start to its stop."""
    away = list(moves)
    return excess - occupancy(
        len(excess),
        [move.start for move in away],
        [move.stop for move in away],
        [move.size_bytes for move in away],
    )


def cover(excess: Bytes, ranked: Sequence[Move], *, always: Iterable[Move] = ()) -> list[Move] | None:
    """A cover from the front of ``ranked`` in which nothing is superfluous; None where there is none.

    ``always`` is moved in any case, and is part of what is returned.
    """
    fixed = list(always)
    left = left_over(excess, fixed)
    taken: list[Move] = []
    for move in ranked:
        window = left[move.start : move.stop]
        if window[window.argmax()] > 0:
            window -= move.size_bytes
            taken.append(move)
    if (left > 0).any():
        return None
    return fixed + _thin(left, taken)


def _thin(left: Bytes, taken: list[Move]) -> list[Move]:
    """Drop what is not needed, the last taken first."""
    kept = []
    for move in reversed(taken):
        window = left[move.start : move.stop]
        if window[window.argmax()] + move.size_bytes <= 0:
            window += move.size_bytes
        else:
            kept.append(move)
    return kept[::-1]
