"""Backends: the switches that choose the kernel of an op, and with it the bits of its result.

A program may turn them around a part of its forward pass, or between forward and backward. An op that is
run again must find them as it did the first time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torchlms.eager.private import backend_switches

State = tuple[Any, ...]  # one setting for each switch


class Backends:
    """The switches that matter on one kind of device, looked at during one step or one recipe."""

    def __init__(self, device_type: str) -> None:
        self._slow, self._quick = backend_switches(device_type)
        self._seen: State = ()
        self._state: State = ()

    def state(self) -> State:
        """How they stand: the same object as long as nobody turns any, for it is asked for at each op.

        The slow ones are looked at when this is first asked for, and whenever a quick one was turned.
        """
        seen = tuple([read() for read, _ in self._quick])
        if seen != self._seen:
            self._seen = seen
            self._state = (*(read() for read, _ in self._slow), *seen)
        return self._state

    @contextlib.contextmanager
    def set_to(self, wanted: State) -> Iterator[None]:
        """Have them stand as ``wanted``, and afterwards as they do now."""
        now = self.state()
        if wanted == now or not wanted:
            yield
            return
        switches = zip((*self._slow, *self._quick), now, wanted, strict=True)
        turned = [(write, before, to) for (_, write), before, to in switches if before != to]
        try:
            for write, _, to in turned:
                write(to)
            yield
        finally:
            for write, before, _ in turned:
                write(before)
