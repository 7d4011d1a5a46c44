"""Finding: one thing that was looked at, how it is, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """How a thing is. A note costs something or is worth knowing; only attention is a fault."""

    OK = "ok"
    NOTE = "note"
    ATTENTION = "attention"


@dataclass(frozen=True, slots=True)
class Finding:
    """``next_step`` says what to do about a note or a fault; nothing where there is nothing to do."""

    topic: str
    state: State
    found: str
    next_step: str = ""


def fine(topic: str, found: str) -> Finding:
    return Finding(topic, State.OK, found)


def note(topic: str, found: str, next_step: str = "") -> Finding:
    return Finding(topic, State.NOTE, found, next_step)


def attention(topic: str, found: str, next_step: str) -> Finding:
    return Finding(topic, State.ATTENTION, found, next_step)
