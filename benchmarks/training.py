"""Training: the plain run, the run under LMS and its rivals, measured step by step.

[Note: One process, plain first]
cuDNN keeps the algorithm that it chose for a shape for the life of the process, and a shape that it
meets without room for a workspace keeps a slow one. So the plain run comes first, uncapped; then
everything is freed and LMS runs under the cap; then plain again, which shows how far two plain runs
differ and that LMS left nothing behind. That LMS itself starves no convolution that it is the first
to meet is another row (convolutions.py), in processes that have run nothing else. Rivals run under
the cap in processes of their own.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import tempfile
import traceback
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from torchlms.bench.flags import Flags, flags_set
from torchlms.bench.networks import get_network
from torchlms.bench.options import BenchOptions, Way
from torchlms.bench.peak import AllocatorPeak, pinned_peak_bytes, plain_peak_bytes
from torchlms.bench.speed import spread
from torchlms.bench.ways import apply_way, capped, open_lms
from torchlms.bench.workload import Workload, make_workload
from torchlms.core import joint, planner
from torchlms.core.plan import Choice
from torchlms.core.record import to_json
from torchlms.core.rules import Rules
from torchlms.eager import private
from torchlms.errors import LMSError
from torchlms.memory.arena import pinned_bytes_in_use
from torchlms.memory.device import open_device
from torchlms.memory.limits import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rows import Rival, Row

    Emit = Callable[[dict[str, Any]], None]

_MOST_EXTRA_WARMUP = 80  # steps, while LMS still plans anew, learns where memory is tight, or races plans
_IN_A_ROW = 4  # steps of the warm-up between two looks at what LMS does
_CALM_STEPS = 6  # steps without a new plan before timing begins: the allocator has to settle, too
_AGAIN_WARMUP, _AGAIN_STEPS = 3, 7
_WAITED_STEPS = 5
_ASIDE_ROUNDS = 4
_ASIDE_LMS_WARMUP = 5  # recorded, settled, and some in which the allocator finds its sizes
_NEED_BATCHES = (2048, 4096)
_NEED_STEPS = 3
_NEED_TOLERANCE = 0.01

# Of LMS's own figures, those that a result keeps.
_STATS = (
    "record_steps",
    "pinned_bytes",
    "peak_host_bytes",
    "bytes_out_per_step",
    "bytes_in_per_step",
    "disk_bytes_per_step",
    "reclaims",
    "reclaimed_bytes",
    "retries",
    "late_fetches",
    "starved_convolutions",
    "replans",
    "strayed",
    "plan",
    "plan_s",
)


# What a planned step should do without.
_TROUBLE = ("reclaims", "retries", "late_fetches", "starved_convolutions", "replans", "strayed")


class Trainer:
    """One workload, and what its steps gave."""

    def __init__(self, options: BenchOptions) -> None:
        self.options = options
        self.workload: Workload = make(options)
        self._device = open_device(self.workload.device)
        self.peak = AllocatorPeak(self.workload.device, each_step=False)
        self.seconds: list[float] = []
        self.losses: list[str] = []
        self.pinned_bytes = 0
        self.ledger_bytes = 0  # CPU: peak over warm-up too
        self.timed_from = 0

    def step(self, count: int = 1) -> None:
        """So many steps in a row, as in a loop that looks at its loss now and then: the device is waited for
        at the end. A step takes from the end of the one before to its own, on the device."""
        losses = []
        marks = [self._device.mark()]
        for _ in range(count):
            losses.append(self.workload.step())
            marks.append(self._device.mark())
            self.peak.after_step()
            self.pinned_bytes = max(self.pinned_bytes, pinned_bytes_in_use())
        self.losses += [float(loss.item()).hex() for loss in losses]
        self._device.synchronize()
        self.seconds += [later.since_s(earlier) for earlier, later in pairwise(marks)]

    def waited_s(self, count: int = _WAITED_STEPS) -> float:
        """The median of steps after each of which the device is waited for, as in a loop that looks at every
        loss: the program cannot get ahead of it. They are not among the timed ones."""
        for _ in range(count):
            self.step()
        waited_s, self.seconds = self.seconds[-count:], self.seconds[:-count]
        return statistics.median(waited_s)

    def start_timing(self) -> None:
        """What follows is timed, what was before is warm-up."""
        gc.collect()
        self.timed_from = len(self.seconds)
        self.peak.start_phase()

    def entry(self, way: str) -> dict[str, Any]:
        """The figures of the timed steps; losses of all."""
        timed_s = self.seconds[self.timed_from :]
        network = get_network(self.options.model)
        seconds = spread(timed_s)
        items = network.items_per_step(self.options.network_options())
        return {
            "way": way,
            "lms": way.startswith(Way.LMS.value),
            "steps": len(timed_s),
            "warmup_s": [round(second, 5) for second in self.seconds[: self.timed_from]],
            "step_s": asdict(seconds),
            "items_per_s": items / seconds.median,
            "unit": network.unit,
            "losses": self.losses,
            "peak_device_bytes": self.peak.allocated_bytes,
            "peak_reserved_bytes": self.peak.reserved_bytes,
            "whole_run_device_bytes": self.peak.whole_allocated_bytes,
            "whole_run_reserved_bytes": self.peak.whole_reserved_bytes,
        }


def make(options: BenchOptions) -> Workload:
    """The workload, changed as its way wants it."""
    workload = make_workload(get_network(options.model), options)
    apply_way(workload, options.way)
    return workload


def first_line(error: BaseException) -> str:
    """What a result keeps of an error."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, LMSError) else f"{type(error).__name__}: {text}"


def tidy() -> None:
    """Leave nothing of the run before on the device, nor in its peaks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def flags_of(row: Row) -> Iterator[Flags]:
    """The row's flags, the same for every way. Else as torch ships them."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic
    cudnn.deterministic = row.cudnn_deterministic
    try:
        with flags_set(row.options) as flags:
            yield flags
    finally:
        cudnn.deterministic = before


def measure_row(row: Row, emit: Emit) -> None:
    """Plain, LMS and plain again; each entry is emitted as soon as it exists."""
    options = resolved(row)
    if row.need_over_cap:
        options, plain = plain_in_need(row, options)
    else:
        plain = measure_plain(options, row.warmup, row.steps)
    if row.share:
        need_bytes = plain["whole_run_reserved_bytes" if row.cuda else "peak_device_bytes"]
        options = replace(options, budget=str(int(row.share * need_bytes)))
    if row.share and not row.cuda:
        fixed_bytes = plain["fixed_bytes"] = _fixed_bytes(options)
        plain["fixed_share"] = fixed_bytes / plain["peak_device_bytes"]
    emit(plain)
    try:
        emit(measure_lms(options, row.warmup, row.steps))
    except Exception as error:  # plain is run again all the same
        traceback.print_exc()
        emit({"way": Way.LMS.value, "lms": True, "error": first_line(error)})
        del error
    again = measure_plain(options, _AGAIN_WARMUP, _AGAIN_STEPS, ledger=False)
    again["way"] = "none_again"
    emit(again)


def measure_rival(row: Row, rival: Rival, emit: Emit, batch_size: int = 0) -> None:
    """One rival under the cap, with the few steps that it is given."""
    options = resolved(row)
    options = replace(
        options, way=rival.way, batch_size=batch_size or options.batch_size, budget=None, cap=None
    )
    device = options.torch_device()
    limit_bytes = None
    if device.type == "cuda" and row.options.budget is not None:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        limit_bytes = parse_bytes(row.options.budget, whole_bytes=total_bytes)
    with capped(device, limit_bytes):
        trainer = Trainer(options)
        trainer.step(rival.warmup)
        trainer.start_timing()
        trainer.step(rival.steps)
    emit(
        {
            **trainer.entry(rival.way.value),
            "cap_bytes": limit_bytes,
            "peak_host_bytes": pinned_peak_bytes(device),
        }
    )


def measure_plain(options: BenchOptions, warmup: int, steps: int, *, ledger: bool = True) -> dict[str, Any]:
    """Uncapped, with nothing installed. On the CPU the peak comes from a second pass."""
    tidy()
    trainer = Trainer(replace(options, way=Way.NONE, budget=None))
    trainer.step(warmup)
    trainer.start_timing()
    trainer.step(steps)
    entry = trainer.entry(Way.NONE.value)
    if options.device != "cpu":
        entry["waited_s"] = trainer.waited_s()
    if options.device == "cpu" and ledger:
        plain = trainer.options
        del trainer
        entry["peak_device_bytes"] = entry["whole_run_device_bytes"] = plain_peak_bytes(lambda: make(plain))
    return entry


def measure_lms(options: BenchOptions, warmup: int, steps: int) -> dict[str, Any]:
    """Under LMS with its budget; timing begins once no plan has been made for a few steps."""
    tidy()
    trainer = Trainer(options)
    with lms_around(trainer) as lms:
        warm_up(trainer, lms, warmup)
        before = lms.stats()
        trainer.start_timing()
        trainer.step(steps)
        stats = dict(lms.stats())
        entry = trainer.entry(Way.LMS.value)
        if options.device != "cpu":
            entry["waited_s"] = trainer.waited_s()
    figures = lms_figures(lms, stats, trainer)
    figures["while_timed"] = {name: stats[name] - before[name] for name in _TROUBLE}
    return {**entry, **figures}


@contextlib.contextmanager
def lms_around(trainer: Trainer) -> Iterator[Any]:
    """LMS as a user opens it; on the CPU with a spill file in a temporary folder."""
    with contextlib.ExitStack() as stack:
        options = trainer.options
        if options.device == "cpu" and options.disk_dir is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="torchlms-benchmark-"))
            options = replace(options, disk_dir=folder)
        yield stack.enter_context(open_lms(trainer.workload, options))


def warm_up(trainer: Trainer, lms: Any, least: int) -> None:
    """At least so many steps, and more while LMS still plans anew or learns. Most run ahead of the device, as
    those that are timed do: LMS settles for how the loop runs."""
    calm, before = 0, (0, 0)
    while len(trainer.seconds) < least or (
        calm < _CALM_STEPS and len(trainer.seconds) < least + _MOST_EXTRA_WARMUP
    ):
        trainer.step(_IN_A_ROW)
        stats = lms.stats()
        trainer.ledger_bytes = max(trainer.ledger_bytes, stats.get("peak_device_bytes", 0))
        now = (stats.get("replans", 0), stats.get("record_steps", 0))
        busy = now != before or stats.get("lessons") or stats.get("racing")
        calm = 0 if busy else calm + _IN_A_ROW
        before = now


def lms_figures(lms: Any, stats: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """What LMS says of itself, what it predicted, and the best that its simulator knows."""
    device = trainer.workload.device
    predicted = dict(stats.get("predicted") or {})
    figures: dict[str, Any] = {
        "state": stats["state"],
        "budget_bytes": stats["budget_bytes"],
        "record_s": sum(trainer.seconds[: stats["record_steps"]]),
        "predicted": predicted,
        "host_pinned_bytes": trainer.pinned_bytes,
        **{name: stats[name] for name in _STATS if name in stats},
        **_best(lms),
    }
    if device.type == "cpu":
        figures["peak_device_bytes"] = stats["peak_device_bytes"]
        figures["whole_run_device_bytes"] = max(trainer.ledger_bytes, stats["peak_device_bytes"])
    figures["machine"] = to_json(lms.machine)
    return figures


def _best(lms: Any) -> dict[str, float]:
    """The shortest step that the planner finds if the allocator could use every byte of the budget."""
    tape, plan = lms.tape, lms.plan
    if tape is None or plan is None or not plan.moves:
        return {}
    recompute = any(move.choice is Choice.RECOMPUTE for move in plan.moves)
    make = joint.plan if recompute else planner.plan
    best = make(tape, lms.machine, plan.budget, Rules(recompute=recompute), headroom_bytes=0, copies=1.0)
    return {
        "best_s": best.predicted.step_s,
        "lower_bound_s": planner.lower_bound(tape, lms.machine, plan.budget, recompute=recompute),
        "ops": len(tape.ops),
    }


# -- a difference of one per cent --------------------------------------------------------------


def measure_aside(row: Row, emit: Emit) -> None:
    """Plain and LMS in turns: clocks and temperature drift by as much as is to be seen."""
    options = resolved(row)
    tidy()
    plain = Trainer(replace(options, way=Way.NONE, budget=None))
    ours = Trainer(options)
    timed: dict[str, list[float]] = {"plain": [], "lms": []}
    ratios: list[float] = []
    found: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    for turn in range(_ASIDE_ROUNDS):
        plain.step(row.warmup if turn == 0 else _AGAIN_WARMUP)
        plain.start_timing()
        plain.step(row.steps)
        if turn == 0:
            alone = {name: figure for name, figure in plain.entry("").items() if name.endswith("_bytes")}
        with lms_around(ours) as lms:
            ours.step(_ASIDE_LMS_WARMUP)
            ours.start_timing()
            ours.step(row.steps)
            if turn == 0:
                stats = dict(lms.stats())
                found = {**_installed(lms, ours.workload), **lms_figures(lms, stats, ours)}
        halves = (plain.seconds[plain.timed_from :], ours.seconds[ours.timed_from :])
        for seconds, name in zip(halves, ("plain", "lms"), strict=True):
            timed[name] += seconds
        ratios.append(statistics.median(halves[0]) / statistics.median(halves[1]))
    shared = {"rounds": _ASIDE_ROUNDS}
    emit({**plain.entry(Way.NONE.value), **alone, **_over(timed["plain"], plain), **shared})
    emit(
        {**ours.entry(Way.LMS.value), **found, **_over(timed["lms"], ours), **shared, "round_ratios": ratios}
    )


def _over(timed_s: list[float], trainer: Trainer) -> dict[str, Any]:
    """The figures of all rounds together. What was warm-up is left out here: it lies in between."""
    seconds = spread(timed_s)
    items = get_network(trainer.options.model).items_per_step(trainer.options.network_options())
    return {
        "steps": len(timed_s),
        "step_s": asdict(seconds),
        "items_per_s": items / seconds.median,
        "warmup_s": [round(second, 5) for second in trainer.seconds[: trainer.options.warmup]],
    }


def _installed(lms: Any, workload: Workload) -> dict[str, Any]:
    """Whether anything stands between the program and torch, apart from one hook on the model."""
    modules = [module for module in workload.model.modules() if module is not workload.model]
    hooks = sum(
        len(getattr(module, name, ()))
        for module in modules
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    return {
        "state": lms.state,
        "dispatch_mode": private.top_dispatch_mode() is not None,
        "saved_tensor_hooks": private.top_saved_tensor_hooks() is not None,
        "submodule_hooks": hooks,
    }


# -- sizes ---------------------------------------------------------------------------------------


def resolved(row: Row) -> BenchOptions:
    return replace(row.options.resolve(get_network(row.options.model)), warmup=row.warmup)


def plain_in_need(row: Row, options: BenchOptions) -> tuple[BenchOptions, dict[str, Any]]:
    """The batch for which plain reserves so many times the cap, and the plain run at that batch.

    From two small batches, then once more from what that batch really took.
    """
    assert options.budget is not None
    cap_bytes = parse_bytes(options.budget)
    wanted_bytes = row.need_over_cap * cap_bytes
    small = [measure_plain(replace(options, batch_size=n), 0, _NEED_STEPS) for n in _NEED_BATCHES]
    points = [
        (float(n), float(entry["whole_run_reserved_bytes"]))
        for n, entry in zip(_NEED_BATCHES, small, strict=True)
    ]
    for last in (False, True):
        batch = _at(points[-2:], wanted_bytes)
        options = replace(options, batch_size=batch)
        plain = measure_plain(options, row.warmup, row.steps)
        need_bytes = plain["whole_run_reserved_bytes"]
        plain["batch_size"], plain["need_over_cap"] = batch, need_bytes / cap_bytes
        if last or abs(need_bytes / wanted_bytes - 1) <= _NEED_TOLERANCE:
            break
        points.append((float(batch), float(need_bytes)))
    return options, plain


def _at(points: list[tuple[float, float]], wanted_bytes: float) -> int:
    (low, low_bytes), (high, high_bytes) = points
    slope = (high_bytes - low_bytes) / (high - low)
    return max(1, round(high + (wanted_bytes - high_bytes) / slope))


def _fixed_bytes(options: BenchOptions) -> int:
    """Parameters, gradients and optimizer states: what does not move."""
    trainer = Trainer(replace(options, way=Way.NONE, budget=None))
    trainer.step()
    parameters = list(trainer.workload.model.parameters())
    states = [
        item
        for state in trainer.workload.optimizer.state.values()
        for item in state.values()
        if isinstance(item, torch.Tensor)
    ]
    return sum(tensor.nbytes for tensor in (*parameters, *parameters, *states))
