"""Rules: what the user forbids the planner to move, and what the user tells it to move."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torchlms.errors import BadOption

if TYPE_CHECKING:
    from torchlms.core.tape import Op, Tape, Value

    Judge = Callable[[Value], "tuple[Verdict, str]"]

MIB = 1 << 20


class Verdict(str, Enum):
    """What rules say of one value."""

    KEEP = "keep"  # never moves
    MOVE = "move"  # moves in every idle stretch in which it can
    FREE = "free"  # the planner decides


class Copies(str, Enum):
    """Which copies run beside the ops, and which are waited for where they begin."""

    OVERLAP = "overlap"
    WAIT_OUT = "wait out"
    WAIT_IN = "wait in"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Rules:
    """What may leave, and when it comes back. Patterns are shell-style (``*``, ``?``, ``[...]``) and
    case-sensitive. A module pattern matches a module and everything inside it: ``layer1`` covers
    ``layer1.0.conv1``. An op pattern matches a name such as ``aten.relu.default``: ``aten.relu*``.

    By the module and op that made a value: ``keep_*`` ones stay, ``move_*`` ones leave in every idle
    stretch, and where there are ``only_*`` patterns, what matches none of them stays. By the modules and
    ops that read it: ``keep_read_in``, ``keep_read_by``, ``only_read_in`` and ``only_read_by``. Keep wins.

    Values below ``min_bytes`` stay unless nothing else can make the step fit, or a move rule names them.
    Values idle for fewer than ``min_idle_ops`` ops stay, and of the others at most the ``most_values``
    largest leave. Copies back begin at least ``reload_ahead_ops`` ops before the value is needed, where
    memory permits, and at most ``reload_within_ops``. ``copies`` says which copies run beside the ops:
    all (``overlap``), or not those out (``wait out``), not those back (``wait in``), or none (``wait``).
    Plans leave ``headroom_bytes`` of the budget free: None for what the allocator is known to need.
    With ``recompute`` values that no move rule names may be dropped and made again, too.
    With ``held`` what the program itself still holds (a skip connection, a block's input) may leave between
    two ops that touch it; for programs that read tensors by torch's own ops only.
    """

    keep_modules: tuple[str, ...] = ()
    keep_ops: tuple[str, ...] = ()
    move_modules: tuple[str, ...] = ()
    move_ops: tuple[str, ...] = ()
    min_bytes: int = MIB
    recompute: bool = True
    only_modules: tuple[str, ...] = ()
    only_ops: tuple[str, ...] = ()
    keep_read_in: tuple[str, ...] = ()
    keep_read_by: tuple[str, ...] = ()
    only_read_in: tuple[str, ...] = ()
    only_read_by: tuple[str, ...] = ()
    min_idle_ops: int = 0
    most_values: int | None = None
    reload_ahead_ops: int = 0
    reload_within_ops: int | None = None
    copies: Copies = Copies.OVERLAP
    headroom_bytes: int | None = None
    held: bool = False

    def __post_init__(self) -> None:
        for name in _PATTERN_FIELDS:
            object.__setattr__(self, name, _read_patterns(name, getattr(self, name)))
        for name in ("recompute", "held"):
            if not isinstance(getattr(self, name), bool):
                raise BadOption(f"{name} must be true or false; got {getattr(self, name)!r}")
        for name, unit in _COUNTS.items():
            count = getattr(self, name)
            if count is None and name in _OPEN_COUNTS:
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise BadOption(f"{name} must be a number of {unit}, 0 or more; got {count!r}")
        if self.reload_within_ops is not None and self.reload_within_ops < self.reload_ahead_ops:
            raise BadOption(
                f"reload_within_ops={self.reload_within_ops} is less than "
                f"reload_ahead_ops={self.reload_ahead_ops}: no copy back could begin in time"
            )
        try:
            object.__setattr__(self, "copies", Copies(self.copies))
        except ValueError:
            choices = ", ".join(repr(choice.value) for choice in Copies)
            raise BadOption(f"copies must be one of {choices}; got {self.copies!r}") from None

    @staticmethod
    def read(options: Mapping[str, Any]) -> Rules:
        """Rules from plain options; BadOption names the first one that is unknown or cannot be read."""
        known = [field.name for field in fields(Rules)]
        for name in options:
            if name not in known:
                alike = difflib.get_close_matches(str(name), known, n=1)
                meant = f": did you mean {alike[0]!r}?" if alike else ";"
                raise BadOption(f"unknown rule {name!r}{meant} the rules are {', '.join(known)}")
        return Rules(**options)

    @property
    def waits_out(self) -> bool:
        """Whether ops wait for every copy out where it begins."""
        return self.copies in (Copies.WAIT_OUT, Copies.WAIT)

    @property
    def within_ops(self) -> int | None:
        """At most how many ops before the need a copy back begins; None where that is open."""
        return 0 if self.copies in (Copies.WAIT_IN, Copies.WAIT) else self.reload_within_ops

    def judge(self, value: Value, readers: Iterable[Op] = ()) -> tuple[Verdict, str]:
        """What the patterns say of ``value``, which ``readers`` read, and why in a few words."""
        readers = tuple(readers)
        for verdict, names in _VERDICTS:
            for name in names:
                for pattern in getattr(self, name):
                    if _matches(name, pattern, value, readers):
                        return verdict, f"{name} {pattern!r}"
            if verdict is Verdict.KEEP:
                left_out = self._left_out(value, readers)
                if left_out:
                    return Verdict.KEEP, left_out
        return Verdict.FREE, ""

    def _left_out(self, value: Value, readers: tuple[Op, ...]) -> str:
        """The first rule that names others only."""
        for name in _ONLY:
            patterns = getattr(self, name)
            if patterns and not any(_matches(name, pattern, value, readers) for pattern in patterns):
                return name
        return ""


def leavers(rules: Rules, tape: Tape) -> dict[int, str]:
    """The values that may leave at all, by id, each with the rule that demands it, or nothing."""
    return _sorted(rules, tape)[0]


def stayers(rules: Rules, tape: Tape) -> dict[int, str]:
    """The values that could leave and stay all the same, by id, each with the rule that keeps it."""
    return _sorted(rules, tape)[1]


def _sorted(rules: Rules, tape: Tape) -> tuple[dict[int, str], dict[int, str]]:
    """``leavers`` and ``stayers``."""
    judge = _judge(rules, tape)
    leave: dict[int, str] = {}
    stay: dict[int, str] = {}
    free: list[Value] = []
    for value in tape.values:
        if not value.movable or value.size_bytes <= 0:
            continue
        verdict, reason = judge(value)
        if verdict is Verdict.MOVE:
            leave[value.id] = reason
        elif verdict is Verdict.KEEP:
            stay[value.id] = reason
        elif _idle_ops(value, len(tape.ops)) < rules.min_idle_ops:
            stay[value.id] = f"min_idle_ops {rules.min_idle_ops}"
        else:
            free.append(value)
    if rules.most_values is not None:
        free.sort(key=lambda value: (-value.size_bytes, value.id))
        most = max(0, rules.most_values - len(leave))
        stay.update((value.id, f"most_values {rules.most_values}") for value in free[most:])
        del free[most:]
    leave.update((value.id, "") for value in free)
    return leave, stay


def unmatched(rules: Rules, tape: Tape) -> tuple[str, ...]:
    """The patterns that match no value of ``tape``, each as ``field 'pattern'``: probably misspelt."""
    made = {(value.module, value.op): value for value in tape.values}.values()
    reading = tuple({(op.module, op.name): op for op in tape.ops if op.reads}.values())
    return tuple(
        f"{name} {pattern!r}"
        for name, pattern in _patterns(rules)
        if not any(_matches(name, pattern, value, reading) for value in made)
    )


_VERDICTS = (
    (Verdict.KEEP, ("keep_modules", "keep_ops", "keep_read_in", "keep_read_by")),
    (Verdict.MOVE, ("move_modules", "move_ops")),
)
_ONLY = ("only_modules", "only_ops", "only_read_in", "only_read_by")
_PATTERN_FIELDS = (*(name for _, names in _VERDICTS for name in names), *_ONLY)
_COUNTS = {
    "min_bytes": "bytes",
    "min_idle_ops": "ops",
    "most_values": "values",
    "reload_ahead_ops": "ops",
    "reload_within_ops": "ops",
    "headroom_bytes": "bytes",
}
_OPEN_COUNTS = ("most_values", "reload_within_ops", "headroom_bytes")  # None: as many as it takes


def _read_patterns(name: str, patterns: Any) -> tuple[str, ...]:
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(patterns, (tuple, list)) or not all(isinstance(item, str) for item in patterns):
        raise BadOption(
            f"{name} must be a pattern, or a list of them, such as ['layer1.*']; got {patterns!r}"
        )
    if not all(patterns):
        raise BadOption(f"{name} holds an empty pattern; use '*' to match everything")
    return tuple(patterns)


def _judge(rules: Rules, tape: Tape) -> Judge:
    """``rules.judge`` for the values of ``tape``; their readers are looked up only if some rule asks."""
    if not any(getattr(rules, name) for name in _PATTERN_FIELDS if "_read_" in name):
        return rules.judge
    readers: dict[int, list[Op]] = {}
    for op in tape.ops:
        for value in op.reads:
            readers.setdefault(value, []).append(op)
    return lambda value: rules.judge(value, readers.get(value.id, ()))


def _idle_ops(value: Value, count: int) -> int:
    """The longest idle stretch, in ops of a tape of ``count``."""
    lengths = (stretch.stop - stretch.start for stretch in value.idle)
    return max((length if length > 0 else length + count for length in lengths), default=0)


def _patterns(rules: Rules) -> Iterator[tuple[str, str]]:
    for name in _PATTERN_FIELDS:
        for pattern in getattr(rules, name):
            yield name, pattern


def _matches(name: str, pattern: str, value: Value, readers: Iterable[Op]) -> bool:
    if name.endswith("_ops"):
        return fnmatchcase(value.op, pattern)
    if name.endswith("_read_by"):
        return any(fnmatchcase(op.name, pattern) for op in readers)
    if name.endswith("_read_in"):
        return any(_inside(op.module, pattern) for op in readers)
    return _inside(value.module, pattern)


def _inside(module: str, pattern: str) -> bool:
    """Whether ``pattern`` matches ``a.b.c``, ``a.b`` or ``a``."""
    while module:
        if fnmatchcase(module, pattern):
            return True
        module = module.rpartition(".")[0]
    return False
