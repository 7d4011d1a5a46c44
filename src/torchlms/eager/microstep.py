"""Micro-step: where one lap of the tape is, and who watches it.

[Note: Micro-steps]
A micro-step is a forward pass with the backward passes over it, and whatever follows (optimizer,
data, evaluation) until the next forward pass saves its first tensor. Accumulation, several losses
and evaluation loops in between need no special treatment: each micro-step is one lap of the tape.

A new micro-step begins when a tensor is saved outside any backward pass and nothing saved since the last
beginning is alive any more, or a backward pass has run since then and the tensor does not come out of the
same graph (graph.py), as the slope in a gradient penalty does. On a CPU that first tensor may be one that
stays where it is, such as a batch that numpy made or that a worker shares.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torchlms.eager.graph import Graph

if TYPE_CHECKING:
    import weakref

    from torchlms.eager.follower import Follower
    from torchlms.eager.provenance import Provenance
    from torchlms.eager.recorder import Recorder
    from torchlms.eager.routine import Routine
    from torchlms.eager.saved import Kept
    from torchlms.eager.slot import Slot
    from torchlms.eager.timer import Lap, OpTimer


class MicroStep:
    """One micro-step; without a ``routine`` none has begun, or it is over, and nobody watches."""

    __slots__ = (
        "backward",
        "backward_seen",
        "began_s",
        "by_ordinal",
        "clock",
        "follower",
        "graph",
        "lap",
        "learning",
        "ooms_before",
        "opened_by",
        "ordinal",
        "plainly",
        "provenance",
        "quiet",
        "quiet_until",
        "recorder",
        "routine",
        "strayed",
        "timer",
    )

    def __init__(self, routine: Routine | None = None, before: Graph | None = None) -> None:
        self.routine = routine
        self.recorder: Recorder | None = None
        self.follower: Follower | None = None
        self.timer: OpTimer | None = None
        self.provenance: Provenance | None = None
        self.lap: Lap | None = None
        self.opened_by: weakref.ref[Kept] | None = None  # what was saved first, where that never moves
        self.clock = 0  # the op that comes next, as the tape counts them
        self.ordinal = 0  # of the storage that is saved next
        self.by_ordinal: dict[int, weakref.ref[Slot]] = {}
        self.backward_seen = False
        self.backward = -1  # the pass that runs, or ran last
        self.graph = Graph(before)
        self.strayed = False  # from the program
        self.learning = False  # where the allocator remaps
        self.plainly = False  # ops only need an eye on running out of memory
        self.quiet: list[Any] = []  # ops of the program that need no more than that
        self.quiet_until = 0  # before this op nothing is due
        self.ooms_before = 0
        self.began_s = time.perf_counter()

    def look_ahead(self) -> None:
        """See until which op there is nothing to do but to run those that are known to be quiet."""
        follower = self.follower if self.plainly else None
        self.quiet = follower.program.quiet if follower is not None else []
        self.quiet_until = min(follower.due, len(self.quiet)) if follower is not None else 0

    def catch_up(self) -> None:
        """Carry out what is due before the op that comes next."""
        if self.follower is not None and self.clock >= self.follower.due:
            began_s = time.perf_counter()
            self.follower.catch_up(self.clock)
            self.look_ahead()
            if self.lap is not None:
                self.lap.values_s += time.perf_counter() - began_s

    def stray(self) -> None:
        """The step is not what the program was made for: from here on nobody follows it."""
        self.strayed = True
        self.follower = None
        self.look_ahead()
