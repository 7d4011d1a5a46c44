"""Rules: what the user forbids the planner to move, and what the user tells it to move."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torchlms.errors import BadOption

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torchlms.core.tape import Tape, Value

MIB = 1 << 20


class Verdict(str, Enum):
    """What rules say of one value."""

    KEEP = "keep"  # never moves
    MOVE = "move"  # moves in every idle stretch in which it can
    FREE = "free"  # the planner decides


@dataclass(frozen=True, slots=True)
class Rules:
    """Shell-style patterns (``*``, ``?``, ``[...]``), case-sensitive.

    A module pattern matches a module and everything inside it: ``layer1`` covers ``layer1.0.conv1``.
    An op pattern matches the name of the op that made the value: ``aten.relu*``. Where both kinds
    match, keep wins. Values below ``min_bytes`` stay unless nothing else can make the step fit, or
    a move rule names them. With ``recompute`` values that nobody's rule names may also be dropped and made
    again by the ops that made them.
    """

    keep_modules: tuple[str, ...] = ()
    keep_ops: tuple[str, ...] = ()
    move_modules: tuple[str, ...] = ()
    move_ops: tuple[str, ...] = ()
    min_bytes: int = MIB
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in _PATTERN_FIELDS:
            patterns = getattr(self, name)
            if not isinstance(patterns, (tuple, list)) or not all(isinstance(item, str) for item in patterns):
                raise BadOption(
                    f"{name} must be a list of patterns, for example ('layer1.*',); got {patterns!r}"
                )
            if not all(patterns):
                raise BadOption(f"{name} holds an empty pattern; use '*' to match everything")
            object.__setattr__(self, name, tuple(patterns))
        if not isinstance(self.recompute, bool):
            raise BadOption(f"recompute must be true or false; got {self.recompute!r}")
        if isinstance(self.min_bytes, bool) or not isinstance(self.min_bytes, int) or self.min_bytes < 0:
            raise BadOption(f"min_bytes must be a number of bytes, 0 or more; got {self.min_bytes!r}")

    @staticmethod
    def read(options: Mapping[str, Any]) -> Rules:
        """Rules from plain options; BadOption names the first one that is unknown or cannot be read."""
        known = [field.name for field in fields(Rules)]
        for name in options:
            if name not in known:
                raise BadOption(f"unknown rule {name!r}; the rules are {', '.join(known)}")
        return Rules(**options)

    def judge(self, value: Value) -> tuple[Verdict, str]:
        """What these rules say of ``value``, and why in a few words."""
        for name, verdict in _VERDICTS:
            for pattern in getattr(self, name):
                if _matches(name, pattern, value):
                    return verdict, f"{name} {pattern!r}"
        return Verdict.FREE, ""


_VERDICTS = (
    ("keep_modules", Verdict.KEEP),
    ("keep_ops", Verdict.KEEP),
    ("move_modules", Verdict.MOVE),
    ("move_ops", Verdict.MOVE),
)
_PATTERN_FIELDS = tuple(name for name, _ in _VERDICTS)


def unmatched(rules: Rules, tape: Tape) -> tuple[str, ...]:
    """The patterns that match no value of ``tape``, each as ``field 'pattern'``: probably misspelt."""
    seen = {(value.module, value.op): value for value in tape.values}.values()
    return tuple(
        f"{name} {pattern!r}"
        for name, pattern in _patterns(rules)
        if not any(_matches(name, pattern, value) for value in seen)
    )


def _patterns(rules: Rules) -> Iterator[tuple[str, str]]:
    for name in _PATTERN_FIELDS:
        for pattern in getattr(rules, name):
            yield name, pattern


def _matches(name: str, pattern: str, value: Value) -> bool:
    if name.endswith("_ops"):
        return fnmatchcase(value.op, pattern)
    return any(fnmatchcase(module, pattern) for module in _enclosing(value.module))


def _enclosing(module: str) -> Iterable[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while module:
        yield module
        module = module.rpartition(".")[0]
