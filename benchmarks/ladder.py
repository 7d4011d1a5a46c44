"""Ladder: steps without a plan, with a plan for twice the memory, and when half of it is taken away.

What should have been planned is then found out op by op: values leave as memory runs out (docs/design.md,
"The ladder"). It must end with the bits of the plain run, and as soon as LMS may plan again the steps must
take as long as under a plan that was there from the start; after memory was taken away, hardly longer.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from training import Trainer, first_line, lms_figures, measure_lms, measure_plain, resolved, tidy

import torchlms
from torchlms.bench.compare import compare_losses
from torchlms.memory.limits import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rows import Row

    from torchlms.bench.options import BenchOptions
    from torchlms.core.plan import Plan

    Emit = Callable[[dict[str, Any]], None]

UNPLANNED = "lms-unplanned"  # never a plan
MISPLANNED = "lms-misplanned"  # a plan that was made for twice the memory, until a new one may be made
SHRUNK = "lms-shrunk"  # half of the memory is taken away while training runs
WAYS = ("none", "lms", UNPLANNED, MISPLANNED, SHRUNK)

_AT_SPEED = 1.10  # of the planned step time
_IN_A_ROW = 3  # steps, to be at it and not there by chance
_COUNTED = ("reclaims", "full_reclaims", "reclaimed_bytes", "retries", "record_steps", "replans")


def measure_ladder(row: Row, emit: Emit) -> None:
    """Plain, planned from the start, and the three ways in which there is no such plan."""
    options = resolved(row)
    plain = measure_plain(options, row.warmup, row.steps)
    if row.share:
        options = replace(options, budget=str(int(row.share * plain["peak_device_bytes"])))
    emit(plain)
    ways: dict[str, Callable[[BenchOptions, Row], dict[str, Any]]] = {
        "lms": lambda options, row: measure_lms(options, row.warmup, row.steps),
        UNPLANNED: _unplanned,
        MISPLANNED: _misplanned,
        SHRUNK: _shrunk,
    }
    for way, measure in ways.items():
        try:
            emit(measure(options, row))
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            emit({"way": way, "lms": True, "error": first_line(error)})
            del error


def _unplanned(options: BenchOptions, row: Row) -> dict[str, Any]:
    """Planning switched off: every value that leaves does so because memory has run out."""
    tidy()
    trainer = Trainer(options)
    with _lms_around(trainer, options.budget, plan=False) as lms:
        trainer.step(row.warmup)
        trainer.start_timing()
        trainer.step(row.steps)
        return _entry(UNPLANNED, lms, trainer)


def _misplanned(options: BenchOptions, row: Row) -> dict[str, Any]:
    """A plan for twice the memory is followed in half of it. Then the budget is said again, and with that a
    new plan may be made."""
    plan = _plan_for_twice(options, row)
    told = replace(plan, budget=replace(plan.budget, device_bytes=_bytes_of(options.budget)))
    tidy()
    trainer = Trainer(options)
    with _lms_around(trainer, options.budget, plan=told) as lms:
        trainer.step(row.warmup)
        before = lms.stats()
        set_s = _set_budget(lms, options.budget)
        trainer.start_timing()
        trainer.step(row.steps)
        return {
            **_entry(MISPLANNED, lms, trainer),
            "moves_of_the_wrong_plan": len(plan.moves),
            "until_then": {name: before[name] for name in _COUNTED},
            "set_budget_s": set_s,
        }


def _plan_for_twice(options: BenchOptions, row: Row) -> Plan:
    tidy()
    twice = str(2 * _bytes_of(options.budget))
    trainer = Trainer(replace(options, budget=twice))
    with _lms_around(trainer, twice) as lms:
        trainer.step(row.warmup)
        plan = lms.plan
    assert plan is not None, "no plan was made in twice the memory"
    return plan


def _shrunk(options: BenchOptions, row: Row) -> dict[str, Any]:
    """Twice the memory, in which LMS has its plan or steps aside, and then suddenly half of it."""
    tidy()
    twice = str(2 * _bytes_of(options.budget))
    trainer = Trainer(replace(options, budget=twice))
    with _lms_around(trainer, twice) as lms:
        trainer.step(row.warmup)
        state = lms.state
        set_s = _set_budget(lms, options.budget)
        trainer.start_timing()
        trainer.step(row.steps)
        return {**_entry(SHRUNK, lms, trainer), "state_before": state, "set_budget_s": set_s}


@contextlib.contextmanager
def _lms_around(
    trainer: Trainer, budget: str | None, *, plan: Plan | bool | None = None
) -> Iterator[torchlms.LMS]:
    """As in training.py, with a plan that no command line can name."""
    workload, options = trainer.workload, trainer.options
    with (
        tempfile.TemporaryDirectory(prefix="torchlms-benchmark-") as folder,
        torchlms.LMS(
            workload.model,
            workload.optimizer,
            budget=budget,
            plan=plan,
            recompute=options.recompute,
            disk_dir=folder if options.device == "cpu" else None,
        ) as lms,
    ):
        yield lms


def _set_budget(lms: torchlms.LMS, budget: str | None) -> float:
    began_s = time.perf_counter()
    lms.set_budget(budget)
    return time.perf_counter() - began_s


def _entry(way: str, lms: torchlms.LMS, trainer: Trainer) -> dict[str, Any]:
    """What every entry has, what LMS did, and the time of each step since timing began."""
    stats = lms.stats()
    figures = lms_figures(lms, stats, trainer)
    figures |= {name: stats[name] for name in _COUNTED}
    figures["each_step_s"] = [round(second, 5) for second in trainer.seconds[trainer.timed_from :]]
    return {**trainer.entry(way), **figures, "way": way}


def _bytes_of(budget: str | None) -> int:
    assert budget is not None
    return parse_bytes(budget)


# -- what follows from the entries -----------------------------------------------------------------


def ladder_figures(done: dict[str, dict[str, Any]], *, cuda: bool, identity_steps: int) -> dict[str, Any]:
    """From the entries without errors, by way."""
    ours = [way for way in WAYS[1:] if way in done]
    found: dict[str, Any] = {"finished": len(ours) == len(WAYS) - 1}
    plain, planned = done.get("none"), done.get("lms")
    if plain is not None and ours:
        plain_s = plain["step_s"]["median"]
        found |= {f"{way}_of_plain": plain_s / done[way]["step_s"]["median"] for way in ours}
        found["of_plain"] = found.pop("lms_of_plain", None)
        found["same_bits"] = all(_same(done[way], plain, identity_steps) for way in ours)
    if ours:
        found["within_budget"] = all(
            done[way][_peak(way, cuda=cuda)] <= done[way]["budget_bytes"] for way in ours
        )
    if planned is not None and MISPLANNED in done:
        planned_s = planned["step_s"]["median"]
        found["misplanned_steps_to_speed"] = steps_to_speed(done[MISPLANNED]["each_step_s"], planned_s)
    if planned is not None and SHRUNK in done:
        # The allocator keeps its large pages, which ask for a plan with more to spare: how soon that one is
        # reached, and how fast it is, are two questions.
        last_s = _at_last_s(done[SHRUNK])
        found["shrunk_steps_to_settle"] = steps_to_speed(done[SHRUNK]["each_step_s"], last_s)
        found["shrunk_of_planned"] = planned["step_s"]["median"] / last_s
    return found


def _peak(way: str, *, cuda: bool) -> str:
    """Over the whole run, but for the one whose budget was twice as large until steps were timed."""
    return f"{'peak' if way == SHRUNK else 'whole_run'}_{'reserved' if cuda else 'device'}_bytes"


def _at_last_s(entry: dict[str, Any]) -> float:
    """A step's time once it has found its plan."""
    return statistics.median(entry["each_step_s"][-_IN_A_ROW:])


def steps_to_speed(seconds: list[float], planned_s: float) -> int:
    """How many steps come before the first of some that all take as long as planned, or nearly so."""
    quick = [second <= _AT_SPEED * planned_s for second in seconds]
    for first in range(len(quick) - _IN_A_ROW + 1):
        if all(quick[first : first + _IN_A_ROW]):
            return first
    return len(quick)


def _same(ours: dict[str, Any], plain: dict[str, Any], least: int) -> bool:
    steps = min(len(ours["losses"]), len(plain["losses"]))
    return (
        steps >= least
        and compare_losses(ours["losses"][:steps], plain["losses"][:steps]).first_difference is None
    )


def note(result: dict[str, Any]) -> str:
    """In words, for the tables; empty where something is missing."""
    done = {entry["way"]: entry for entry in result["entries"] if "error" not in entry}
    figures = result["figures"]
    if not all(way in done for way in WAYS):
        return ""
    milliseconds = {way: done[way]["step_s"]["median"] * 1e3 for way in WAYS}
    slow = statistics.median(done[UNPLANNED]["each_step_s"]) * 1e3
    bits = (
        "the same bits as plain in all of them" if figures["same_bits"] else "**not the same bits as plain**"
    )
    return (
        f"{result['label']}, by the ladder alone: {slow:.0f} ms a step with planning switched off "
        f"({milliseconds['lms']:.0f} ms planned, {milliseconds['none']:.0f} ms plain without a cap). "
        f"Back at planned speed {figures['misplanned_steps_to_speed']} steps after a plan for twice the "
        f"memory may be made anew. After half of the memory was taken away while training runs it settles "
        f"within {figures['shrunk_steps_to_settle']} steps, at {figures['shrunk_of_planned']:.2f} of the "
        f"speed under a plan that was there from the start; {bits}."
    )
