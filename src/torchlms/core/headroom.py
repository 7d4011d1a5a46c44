"""Headroom: what a plan leaves free, because an allocator cannot use every byte that it has reserved.

Holes between blocks do not add up to a large one. Mapping the free pages anew closes them, page by page,
so that what no plan may count on grows with the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchlms.core.machine import Machine

SMALLEST_PAGE_BYTES = 20 << 20  # what PyTorch's allocator maps at a time unless it is told otherwise
_GRAIN_BYTES = 2 << 20  # a device's own pages: what is mapped has to be a multiple of it
_SPARE_FOR_PAGES = 0.04  # of the budget at most: small ones have few pages
_SPARE = 0.01  # of the budget, besides


@dataclass(frozen=True, slots=True)
class _Pages:
    """How a budget is cut: into so ``many`` pages, or into ``fewest`` as long as these are not above
    ``usual_bytes``; and how many of them a plan leaves free."""

    many: int
    fewest: int
    usual_bytes: int
    largest_bytes: int
    spare: int


# Where values can be made again, a little less memory costs next to nothing. Where they can only be moved
# every byte counts, and pages are to waste few.
_DROPPING = _Pages(128, fewest=64, usual_bytes=64 << 20, largest_bytes=256 << 20, spare=2)
_MOVING = _Pages(256, fewest=256, usual_bytes=0, largest_bytes=128 << 20, spare=4)


@dataclass(frozen=True, slots=True)
class Elbow:
    """Elbow room: what memory that nobody can move out of the way takes beyond its size, as a share.

    Values at rest can be moved to close holes; ``flying`` ones, whose copy is under way, cannot, and the
    ``new`` blocks of an op, its results and its workspace, need a hole each.
    """

    flying: float = 0.0
    new: float = 0.0


NO_ELBOW = Elbow()
ELBOW = Elbow(flying=0.2)


def page_bytes(budget_bytes: int, *, drops: bool = True) -> int:
    """In how large pages an allocator under this budget should map memory, for plans that may drop values
    or only move them.

    Mapping and unmapping take a time per page, so there are not to be too many of them. (H200: 80 ms for
    15 GiB in pages of 20 MiB, 28 ms in pages of 64 MiB, 18 in 128, 13 in 256, 10 in 512.)
    """
    pages = _pages(drops)
    usual_bytes = min(pages.usual_bytes, budget_bytes // pages.fewest)
    wanted_bytes = max(usual_bytes, budget_bytes // pages.many, SMALLEST_PAGE_BYTES)
    wanted_bytes = min(wanted_bytes, pages.largest_bytes)
    return wanted_bytes // _GRAIN_BYTES * _GRAIN_BYTES


def headroom_bytes(
    machine: Machine,
    budget_bytes: int,
    asked_bytes: int | None = None,
    *,
    drops: bool = True,
    mapped_bytes: int = 0,
) -> int:
    """What was asked for, else that with which most steps run undisturbed. A ledger, which is the budget of
    a CPU, has no holes. ``mapped_bytes`` is the size of the allocator's pages, if they are not those for
    this budget."""
    if asked_bytes is not None or not machine.link:
        return asked_bytes or 0
    mapped_bytes = mapped_bytes or page_bytes(budget_bytes, drops=drops)
    pages_bytes = min(_pages(drops).spare * mapped_bytes, int(_SPARE_FOR_PAGES * budget_bytes))
    return lean_bytes(machine, budget_bytes) + pages_bytes


def _pages(drops: bool) -> _Pages:
    return _DROPPING if drops else _MOVING


def lean_bytes(machine: Machine, budget_bytes: int) -> int:
    """With which some steps do: those of few, large blocks."""
    return int(_SPARE * budget_bytes) if machine.link else 0


def budget_for(machine: Machine, peak_bytes: int) -> int:
    """A budget that holds ``peak_bytes`` and its own headroom, and not much more."""
    budget_bytes = peak_bytes
    while (short_bytes := peak_bytes + headroom_bytes(machine, budget_bytes) - budget_bytes) > 0:
        budget_bytes += short_bytes
    return budget_bytes
