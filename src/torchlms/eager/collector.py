"""Collector: Python's collector of cycles, what it need not look at, and when it looks.

Saved tensors become Python objects, some ten each, so that full collections come every few steps. Each would
look at all modules ever imported, a third of a second in which the device starves. And one that comes in the
middle of a step looks at what the step has made so far, which will go by itself: some tens of milliseconds
for nothing.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack

_SELDOM = 10  # times as seldom as usual full collections come by themselves


class SparedCollector:
    """Has the collector pass by what is there already, unless somebody sees to that."""

    def __init__(self) -> None:
        self._on = False
        self._looked = False  # everywhere, in the middle of a step: nothing is passed by until it is over
        self._due = 0  # lesser collections after which a full one comes, usually

    def put_on(self, undo: ExitStack) -> None:
        """From here on; ``undo`` gets the opposite."""
        gc.collect()
        if gc.get_freeze_count() > len(gc.get_objects()):  # Python 3.12 itself begins with some
            return
        self._on = True
        gc.freeze()
        undo.callback(gc.unfreeze)
        self._come_seldom(undo)

    def pass_by_more(self) -> None:
        """Also by what has come since: the first steps import a good part of torch. What it passed by until
        now, and nobody holds any more, goes: a model in a cycle with its trainer, say."""
        if self._on:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            self._looked = False

    def look_everywhere(self) -> None:
        """Now, in the middle of a step. What that has made so far is not passed by: should the step fail, its
        exception may hold all of it in a cycle."""
        if self._on:
            gc.unfreeze()
        gc.collect()
        self._looked = True

    def look_now(self) -> None:
        """A step is over and its objects are gone: a full collection that is due soon comes now, and not in
        the middle of the next step."""
        if self._looked:
            self.pass_by_more()
        elif self._due and gc.isenabled() and 2 * gc.get_count()[2] >= self._due:
            gc.collect()

    def _come_seldom(self, undo: ExitStack) -> None:
        """Leave full collections to ``look_now``, though not for ever. (0: this Python makes none.)"""
        usual = gc.get_threshold()
        ours = (*usual[:2], _SELDOM * usual[2])
        self._due = usual[2]
        gc.set_threshold(*ours)

        def put_back() -> None:
            if gc.get_threshold() == ours:  # else the program has set its own meanwhile
                gc.set_threshold(*usual)

        undo.callback(put_back)
