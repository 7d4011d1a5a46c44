"""History: the calls that wrote each storage, and what they read.

[Note: Cells and calls]
A storage has a cell: the history of the calls that wrote it, first the one that made it, then those
that changed it in place. A call remembers its arguments, with each tensor replaced by where it lay:
in which cell, after how many writes, and as which view. Cells hold no device memory. A storage holds
its cell, a cell its calls, a call the cells it read: what nobody can ask for any more goes by itself.
None of them is shown in full (``repr=False``): what is shared would be told again wherever it is met.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torchlms.eager.private import counted_together, counts_writes_first
from torchlms.eager.tensors import is_plain
from torchlms.eager.writes import written_tensors

if TYPE_CHECKING:
    from torchlms.eager.backends import State
    from torchlms.eager.slot import Slot

_MARK = "_torchlms_cell"


@dataclass(slots=True, eq=False, repr=False)
class Cell:
    """One storage's history in one lap of the program."""

    lap: int
    place: int = 0  # among the results of the call that made it
    first_version: int = 0  # before the first write
    made: bool = False  # the history begins with the call that made it
    lasts: bool = False  # a parameter's or a buffer's
    history: list[Call] = field(default_factory=list)
    slot: weakref.ref[Slot] | None = None
    saved_version: int = -1  # of the tensor that autograd saved last
    counter: torch.Tensor | None = None  # shares that tensor's version, and holds none of its memory
    value: int = -1  # the tape's id while recording, if the storage could be held
    size_bytes: int = 0
    coming: tuple[torch.Tensor, ...] = ()  # about to be written, which torch has counted already
    readers: list[weakref.ref[Slot]] | None = None  # dropped, and made from this

    def version_before(self, counter: torch.Tensor) -> int:
        """The version of ``counter``, a tensor in this storage, before the writes that are coming: as many
        are counted as there are tensors, be it one tensor twice."""
        return counter._version - sum(counted_together(tensor, counter) for tensor in self.coming)

    def accounts_for(self, writes: int, version: int) -> bool:
        """Whether the first ``writes`` calls are all that has happened until ``version``. A write from
        another thread or a compiled region is told of by the version alone."""
        return version - self.first_version == writes - 1


@dataclass(slots=True, eq=False, repr=False)  # not frozen, which takes as long again to make
class Ref:
    """A tensor argument: the view ``shape, strides, offset`` of a cell after ``writes`` writes."""

    cell: Cell
    writes: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    version: int
    lasting: torch.Tensor | None = None  # a parameter or buffer: here to stay
    storage: torch.UntypedStorage | None = None  # where it lay, should the program give it another one


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """One op that ran."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    op: int  # its place on the tape
    replayable: bool
    drawn: tuple[torch.Generator, torch.Tensor] | None = None  # from which generator, in which state
    backends: State = ()  # how the switches stood that choose its kernel
    blank: bool = False  # what it makes has no bytes of its own yet
    refs: tuple[Ref, ...] = ()  # all that are among the arguments
    serial: int = 0  # in the order of the program


def mark(storage: torch.UntypedStorage, cell: Cell) -> None:
    """The bytes that ``cell`` tells of now lie in ``storage``."""
    setattr(storage, _MARK, cell)


def marked(storage: torch.UntypedStorage) -> Cell | None:
    """The cell of ``storage``, be it of this lap or of an earlier one."""
    cell: Cell | None = getattr(storage, _MARK, None)
    return cell


def results_of(result: Any) -> list[torch.Tensor | None]:
    """What an op returned, flat; None for what is no tensor."""
    if isinstance(result, (list, tuple)):
        return [found for part in result for found in results_of(part)]
    return [result if isinstance(result, torch.Tensor) else None]


@contextlib.contextmanager
def about_to_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[list[Cell]]:
    """The cells of what ``func`` is about to write and somebody reads. Meanwhile they know what is coming, if
    torch has counted it already."""
    found: dict[int, Cell] = {}
    counted = counts_writes_first(func)
    for tensor in written_tensors(func, args, kwargs):
        cell = marked(tensor.untyped_storage()) if is_plain(tensor) else None
        if cell is not None and cell.readers:
            found[id(cell)] = cell
            if counted:
                cell.coming = (*cell.coming, tensor)
    try:
        yield list(found.values())
    finally:
        for cell in found.values():
            cell.coming = ()
