"""Moves: a value's idle stretch that it could spend elsewhere, and when it leaves and comes back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """One value's one idle stretch, and what its copies cost when nothing else runs.

    On a machine without a link ``out_s`` and ``in_s`` are 0 and only the disk times count.
    """

    value: int
    stretch: int
    size_bytes: int
    start: int
    stop: int
    idle_s: float
    out_s: float
    in_s: float
    write_s: float
    read_s: float
    forced: str = ""  # the rule that demands it

    @property
    def copies_s(self) -> float:
        """Link seconds out and in; without a link, disk seconds."""
        return (self.out_s + self.in_s) or (self.write_s + self.read_s)


@dataclass(frozen=True, slots=True)
class Slot:
    """One move with its place in time and its tier."""

    move: Move
    on_disk: bool
    release_op: int
    reload_op: int
