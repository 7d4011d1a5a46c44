"""Per op: what is worked out once for each op and then only looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerOp(Generic[T]):
    """Remembers what ``work_out`` says of an op.

    By identity: the hash of an op is computed in Python, which would take longer than many an op. The op
    is kept, so that its identity is not given to another.
    """

    __slots__ = ("_known", "_work_out")

    def __init__(self, work_out: Callable[[Any], T]) -> None:
        self._work_out = work_out
        self._known: dict[int, tuple[T, Any]] = {}

    def __call__(self, func: Any) -> T:
        known = self._known.get(id(func))
        if known is None:
            known = self._known[id(func)] = (self._work_out(func), func)
        return known[0]
