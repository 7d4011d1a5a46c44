"""Trial: one case plainly and under LMS that moves whatever may move, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch

from borrowed.case import Case
from borrowed.force import Force, ledger_watch
from borrowed.passes import Run, run

_BUDGET_TRIES = 12
_FIRST_SHARE = 0.6  # of the plain peak
_NEXT_SHARE = 1.05  # of the budget before, at least
_MORE_RUNS = 40  # plain ones where LMS differs, before it is blamed
_MORE_RUNS_FOR_A_MODE = 20  # where a mode that only looks on differs likewise
_SHAKEN_BLOCKS = 50  # of odd sizes, so that memory lies elsewhere: some libraries round by alignment
_NAMES_SHOWN = 3


class Verdict(str, Enum):
    """What came of a case. Of several that apply, the first."""

    ENDED = "ended"  # the process died, or took too long
    REFUSED = "refused"  # LMS said why it would not
    DIFFERS = "differs"  # other bits, or another error
    ANY_MODE = "differs under any mode"  # the same other bits come of a dispatch mode that only looks on
    UNSTEADY = "plain differs"  # from itself, in what is named; all else has the same bits
    SAME_ERROR = "same error"  # plain raises, and LMS raises the same
    SAME = "same bits"  # results, gradients, inputs, parameters, buffers and generators


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on a case and why; values that were away at once, and values that the last plan moves."""

    verdict: Verdict
    why: str = ""
    away: int = 0
    planned: int = 0


@dataclass(frozen=True, slots=True)
class Ways:
    """In which ways LMS is forced on: by a rule that moves everything, by a budget hardly large enough, and
    with values made again."""

    moving: bool = True
    tight: bool = False
    recompute: bool = False


def try_case(case: Case, ways: Ways = Ways()) -> Finding:
    """Two plain runs of ``case``, and one in each of ``ways``; the worst is what counts."""
    plain, again = run(case.make), run(case.make)
    unsteady = differences(plain, again)
    found = []
    if ways.moving:
        found.append(_judge(case, plain, unsteady, run(case.make, Force())))
    if ways.tight:
        found.append(_judge(case, plain, unsteady, run_tight(case, recompute=ways.recompute)))
    order = list(Verdict)
    worst = min(found, key=lambda finding: order.index(finding.verdict))
    return replace(
        worst,
        away=max(finding.away for finding in found),
        planned=max(finding.planned for finding in found),
    )


def run_tight(case: Case, *, recompute: bool) -> Run:
    """Under a budget not much larger than the smallest that works, found as a user would: ask for too little,
    then for what the error says."""
    with ledger_watch() as ledger:
        run(case.make)
    budget_bytes = int(_FIRST_SHARE * ledger.peak_bytes)
    for _ in range(_BUDGET_TRIES):
        found = run(case.make, Force(budget_bytes, everything=False, recompute=recompute))
        if not found.smallest_bytes:
            return found
        budget_bytes = max(found.smallest_bytes, int(_NEXT_SHARE * budget_bytes))
    return found


def _judge(case: Case, plain: Run, unsteady: list[str], forced: Run) -> Finding:
    def verdict(verdict: Verdict, why: str = "") -> Finding:
        return Finding(verdict, why, forced.away, forced.planned)

    if forced.refused:
        return verdict(Verdict.REFUSED, forced.error)
    if forced.error != plain.error:
        return verdict(
            Verdict.DIFFERS, f"plain: {plain.error or 'no error'}; LMS: {forced.error or 'no error'}"
        )
    wrong = [name for name in differences(plain, forced) if name not in unsteady]
    if wrong:
        return verdict(*_blame(case, plain, forced, wrong))
    if unsteady:
        return verdict(Verdict.UNSTEADY, _shown(unsteady))
    return verdict(Verdict.SAME_ERROR, plain.error) if plain.error else verdict(Verdict.SAME)


def _blame(case: Case, plain: Run, forced: Run, wrong: list[str]) -> tuple[Verdict, str]:
    """Whose fault it is: plain runs that differ now and then, torch's that takes another way as soon as any
    dispatch mode is on, or ours. Plain runs come first: one that differs may agree with others by chance."""
    with ledger_watch():
        watched = run(case.make)
    left, ours = wrong, [name for name in wrong if watched.bits.get(name) != forced.bits.get(name)]
    unsteady: set[str] = set()
    for turn in range(_MORE_RUNS if ours else _MORE_RUNS_FOR_A_MODE):
        shaken = [torch.empty(turn + 7 * block) for block in range(_SHAKEN_BLOCKS)]
        unsteady |= {_in_any_step(name) for name in differences(plain, run(case.make))}
        with ledger_watch():
            unsteady |= {_in_any_step(name) for name in differences(watched, run(case.make))}
        del shaken
        left = [name for name in left if _in_any_step(name) not in unsteady]
        if not left:
            return Verdict.UNSTEADY, _shown(wrong)
    ours = [name for name in ours if name in left]
    return (Verdict.DIFFERS, _shown(ours)) if ours else (Verdict.ANY_MODE, _shown(left))


def _in_any_step(name: str) -> str:
    """What is named, whichever the step: where the same is done in each, one shows it for all."""
    return name.partition(": ")[2]


def differences(left: Run, right: Run) -> list[str]:
    """The names of what is not equal to the last bit, in the order in which it came about."""
    names = {**left.bits, **right.bits}
    return [name for name in names if left.bits.get(name) != right.bits.get(name)]


def _shown(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
