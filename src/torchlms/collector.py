"""Collector: Python's collector of cycles, and what it need not look at.

Saved tensors become Python objects, some ten each, so that full collections come every few steps. Each would
look at all modules ever imported, a third of a second in which the device starves.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack


class SparedCollector:
    """Has the collector pass by what is there already, unless somebody sees to that."""

    def __init__(self) -> None:
        self._on = False

    def put_on(self, undo: ExitStack) -> None:
        """From here on; ``undo`` gets the opposite."""
        gc.collect()
        if gc.get_freeze_count() > len(gc.get_objects()):  # Python 3.12 itself begins with some
            return
        self._on = True
        gc.freeze()
        undo.callback(gc.unfreeze)

    def pass_by_more(self) -> None:
        """Also by what has come since: the first steps import a good part of torch."""
        if self._on:
            gc.collect()
            gc.freeze()
