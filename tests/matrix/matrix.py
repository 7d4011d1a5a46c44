"""All rows, in the order of the table."""

from __future__ import annotations

from tests.matrix import layers, numbers, optimizers, passes, programs, values
from tests.matrix.row import Row

GROUPS: dict[str, list[Row]] = {
    "Forward and backward": passes.ROWS,
    "Number formats": numbers.ROWS,
    "Optimizers and parameters": optimizers.ROWS,
    "What is done to values": values.ROWS,
    "Layers": layers.ROWS,
    "Programs": programs.ROWS,
}
ROWS = [row for rows in GROUPS.values() for row in rows]
