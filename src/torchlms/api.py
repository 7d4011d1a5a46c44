"""The public verbs: ``LMS`` around a loop, or ``enable`` and ``disable`` for a whole program."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from torchlms.core.machine import CopyTime, Machine
from torchlms.core.plan import Budget, Plan
from torchlms.core.rules import Rules
from torchlms.core.tape import Kind, Tape
from torchlms.director import Director
from torchlms.eager import private
from torchlms.eager.engine import Engine
from torchlms.eager.install import Installation
from torchlms.eager.labels import ModuleLabels
from torchlms.eager.routine import Verdict
from torchlms.errors import BadOption, NotSupported, PlanMismatch
from torchlms.memory import probe
from torchlms.memory.device import CudaDevice, open_device
from torchlms.memory.disk import default_directory
from torchlms.memory.limits import disk_free_bytes, format_bytes, host_available_bytes, parse_bytes
from torchlms.memory.store import Store
from torchlms.report import report_text
from torchlms.statistics import session_stats

log = logging.getLogger("torchlms")

_KIND = "_torchlms_kind"
_HOST_SHARE = 0.9  # of what is available, by default
_DISK_SHARE = 0.9
_EXPANDABLE = True
_GREW = 1.02  # inputs this much larger than any seen end the standing aside

_current = threading.local()


class LMS:
    """Keeps a training loop within a device memory budget, without changing a bit of its results.

    The first step is recorded (slowly, but within the budget), the next two are timed under a first
    plan, and then the plan is made that is followed. If everything fits, LMS steps aside. Leaving the context, in whatever way, restores
    every hook, mode, memory limit and file; tensors that a graph still needs come home first.

    Promised: same losses, gradients, parameters and buffers as without LMS, and on CUDA that the
    caching allocator never reserves more than ``budget``. Not promised: speed in steps that differ
    from the recorded ones, and the budget once LMS stepped aside.

    ``budget``: bytes, ``"16GiB"``, ``"80%"`` of the device, or None for what the device has.
    ``host_budget``, ``disk_budget``: bytes for values off the device; None for nine tenths of what
    is free. ``disk_dir``: directory for the spill file. ``plan``: a Plan or the path of one, used
    after one recorded step instead of planning. ``rules``: a Rules or a dict of its fields.
    ``device``: where the loop runs; None for where the model's parameters are.

    Raises BadOption, PlanMismatch, NotSupported on entering; BudgetTooSmall and HostBudgetTooSmall
    as soon as they are known.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        budget: str | int | float | None = None,
        host_budget: str | int | float | None = None,
        disk_dir: str | os.PathLike[str] | None = None,
        disk_budget: str | int | float | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        rules: Rules | dict[str, Any] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._given = _read_plan(plan)
        self._rules = rules if isinstance(rules, Rules) else Rules.read(rules or {})
        self._torch_device = _choose_device(model, device)
        self._disk_dir = Path(disk_dir) if disk_dir is not None else default_directory()
        self._sizes = (budget, host_budget, disk_budget)
        _check_sizes(budget, host_budget, disk_budget)
        self._engine: Engine | None = None
        self._director: Director | None = None
        self._installation: Installation | None = None
        self._labels: ModuleLabels | None = None
        self._handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._largest_input_bytes = 0
        self._aside = False

    # -- entering and leaving ----------------------------------------------------------------

    def __enter__(self) -> LMS:
        if getattr(_current, "lms", None) is not None:
            raise NotSupported(
                "LMS is on already in this thread: leave the other LMS, or call disable(), first"
            )
        if self._engine is not None:
            raise NotSupported("this LMS was used before; make a new one")
        _show_log()
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        _current.lms = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, error, traceback
        _current.lms = None
        self._close()

    def _open(self) -> None:
        device = open_device(self._torch_device)
        machine = measured_machine(device.torch_device, self._disk_dir)
        if isinstance(device, CudaDevice):
            whole_bytes, available_bytes = device.total_bytes, device.available_bytes()
        else:
            whole_bytes = available_bytes = host_available_bytes()
        budget, host_budget, disk_budget = self._sizes
        budget_bytes = parse_bytes(budget, whole_bytes=whole_bytes) if budget is not None else available_bytes
        if budget_bytes > whole_bytes:
            raise BadOption(
                f"a budget of {format_bytes(budget_bytes)} is more than {device.torch_device} has "
                f"({format_bytes(whole_bytes)}): leave budget out to use all of it"
            )
        tiers = Budget(
            device_bytes=budget_bytes,
            host_bytes=_or_share(host_budget, host_available_bytes(), _HOST_SHARE),
            disk_bytes=_or_share(disk_budget, disk_free_bytes(self._disk_dir), _DISK_SHARE),
        )
        if self._given is not None and self._given.budget.device_bytes > budget_bytes:
            raise PlanMismatch(
                f"the plan given was made for {format_bytes(self._given.budget.device_bytes)}, more than the "
                f"budget of {format_bytes(budget_bytes)}: leave plan= out to make a new one"
            )
        store = Store(
            device,
            host_budget_bytes=tiers.host_bytes,
            disk_budget_bytes=tiers.disk_bytes,
            disk_dir=self._disk_dir,
        )
        self._undo.append(store.close)
        self._label_storages()
        self._director = Director(
            machine=machine, budget=tiers, rules=self._rules, given=self._given, model=_name(self._model)
        )
        engine = Engine(
            device,
            store,
            budget_bytes=budget_bytes,
            kinds=self._kind_of,
            late_kinds=lambda: list(self._late_storages()),
            prepare=self._director.prepare,
            begin_recording=self._begin_recording,
        )
        self._engine = engine
        if isinstance(device, CudaDevice):
            self._use_expandable_segments()
        device.cap(budget_bytes)
        self._undo.append(device.uncap)
        self._count_what_is_there(engine)
        self._labels = ModuleLabels(engine, self._model)
        self._undo.append(self._labels.off)
        self._installation = Installation(engine)
        self._installation.put_on()
        if self._model is not None:
            self._handles.append(
                self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            )

    def _close(self) -> None:
        """Undo everything, in the opposite order, whatever fails on the way; the first error is raised."""
        steps: list[Callable[[], None]] = [handle.remove for handle in self._handles]
        if self._installation is not None:
            steps.append(self._installation.take_off)
        undo = {step for step in self._undo}
        for step in reversed(self._undo):
            if step.__name__ == "uncap":
                steps.append(step)  # before values come home, which may need more than the budget
                undo.discard(step)
        if self._engine is not None:
            steps.append(self._engine.close)
        steps.extend(step for step in reversed(self._undo) if step in undo)
        self._handles, self._undo = [], []
        failures = []
        for step in steps:
            try:
                step()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    # -- what the engine asks ----------------------------------------------------------------

    def _use_expandable_segments(self) -> None:
        """Back new device memory by remappable pages, so that holes between tensors can be closed."""
        if _EXPANDABLE and not private.expandable_segments():
            torch.cuda.empty_cache()
            if private.set_expandable_segments(True):
                self._undo.append(_use_plain_segments)

    def _label_storages(self) -> None:
        for storage, kind in self._early_storages():
            setattr(storage, _KIND, (id(self), kind))
        self._undo.append(self._unlabel_storages)

    def _unlabel_storages(self) -> None:
        for storage, _ in (*self._early_storages(), *self._late_storages()):
            if hasattr(storage, _KIND):
                delattr(storage, _KIND)

    def _early_storages(self) -> Iterator[tuple[torch.UntypedStorage, Kind]]:
        if self._model is not None:
            for parameter in self._model.parameters():
                yield from _plain(parameter.data, Kind.PARAMETER)
            for buffer in self._model.buffers():
                yield from _plain(buffer, Kind.BUFFER)

    def _late_storages(self) -> Iterator[tuple[torch.UntypedStorage, Kind]]:
        """Gradients and optimizer states, which come and go while the loop runs."""
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        parameters = [parameter for group in groups for parameter in group["params"]]
        if self._model is not None:
            parameters.extend(self._model.parameters())
        for parameter in parameters:
            if parameter.grad is not None:
                yield from _plain(parameter.grad, Kind.GRADIENT)
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                for item in state.values() if isinstance(state, dict) else ():
                    if isinstance(item, torch.Tensor):
                        yield from _plain(item, Kind.STATE)

    def _kind_of(self, storage: torch.UntypedStorage) -> Kind | None:
        label = getattr(storage, _KIND, None)
        return label[1] if label is not None and label[0] == id(self) else None

    def _count_what_is_there(self, engine: Engine) -> None:
        """CPU: the ledger begins with what the model and the optimizer hold already."""
        ledger = getattr(engine.device, "ledger", None)
        if ledger is not None:
            for storage, _ in (*self._early_storages(), *self._late_storages()):
                ledger.add(storage)

    def _begin_recording(self, step: int) -> None:
        assert self._engine is not None
        assert self._labels is not None
        self._labels.on()
        log.info(
            "recording step %d on %s, budget %s; a step being recorded is slow",
            step,
            self._engine.device.torch_device,
            format_bytes(self._engine.ladder.budget_bytes),
        )

    def _before_forward(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """The one hook on the model: a place between ops from which to step aside, or to come back."""
        del module
        engine, installation = self._engine, self._installation
        if engine is None or installation is None or not engine.device.is_cuda:
            return
        if not installation.on:
            if _bytes_in(args, kwargs) > _GREW * self._largest_input_bytes:
                log.info("larger inputs than before: LMS is back")
                self._aside = False
                installation.put_on()
            return
        if not torch.is_grad_enabled():
            return
        self._largest_input_bytes = max(self._largest_input_bytes, _bytes_in(args, kwargs))
        engine.settle()
        known = [routine for routine in engine.routines.values() if routine.recordings]
        if known and all(routine.verdict is Verdict.FITS for routine in known) and installation.on_top():
            engine.end_microstep()
            if self._labels is not None:
                self._labels.off()
            installation.take_off()
            self._aside = True

    # -- asking ------------------------------------------------------------------------------

    @property
    def tape(self) -> Tape | None:
        """The last recorded tape, or None before the first recorded step has ended."""
        return self._engine.last_tape() if self._engine is not None else None

    @property
    def plan(self) -> Plan | None:
        """The plan of the routine planned last, or None before there is one."""
        plans = self._engine.plans() if self._engine is not None else []
        return plans[-1] if plans else None

    @property
    def state(self) -> str:
        """``"off"``, ``"record"``, ``"guard"`` or ``"aside"``."""
        if self._engine is None or (self._engine.dead and not self._aside):
            return "off"
        if self._aside:
            return "aside"
        return "guard" if self._engine.plans() and self._engine.recorder is None else "record"

    def stats(self) -> dict[str, Any]:
        """What happened so far, as plain numbers; the keys are those of ``torchlms bench --json``."""
        return session_stats(self._engine, state=self.state)

    def report(self) -> str:
        """What was decided, why, what was predicted and what was measured, as text."""
        return report_text(self.stats(), self.tape, self.plan)


def enable(
    model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> LMS:
    """Turn LMS on for the rest of the program, in this thread; same options as ``LMS``."""
    lms = LMS(model, optimizer, **options)
    return lms.__enter__()


def disable() -> None:
    """Undo ``enable``; does nothing if LMS is off in this thread."""
    lms: LMS | None = getattr(_current, "lms", None)
    if lms is not None:
        lms.__exit__(None, None, None)


def measured_machine(
    device: torch.device,
    disk_dir: str | os.PathLike[str] | None = None,
    *,
    refresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Machine:
    """What this machine can do, from the cache or measured now (seconds)."""
    directory = Path(disk_dir) if disk_dir is not None else default_directory()
    found = probe.load_or_measure(device, directory, refresh=refresh, progress=progress)
    fields = dataclasses.asdict(found)
    fields["link"] = tuple(CopyTime(*point) for point in found.link)
    return Machine(**fields)


def _read_plan(plan: Plan | str | os.PathLike[str] | None) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        read = plan
    else:
        read = Plan.load(os.fspath(plan))
    if read is not None and read.torch != torch.__version__:
        raise PlanMismatch(
            f"the plan given was made with torch {read.torch}, this is {torch.__version__}: "
            "leave plan= out to make a new one"
        )
    return read


def _choose_device(model: torch.nn.Module | None, device: torch.device | str | None) -> torch.device:
    if model is not None:
        found = {item.device for item in (*model.parameters(), *model.buffers())}
        if len(found) > 1:
            names = ", ".join(sorted(str(item) for item in found))
            raise NotSupported(
                f"the model lies on several devices ({names}): LMS handles one device a process"
            )
        if found and device is not None and found != {_indexed(torch.device(device))}:
            raise BadOption(f"device={device} was asked for, but the model is on {found.pop()}")
        if found:
            device = found.pop()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type not in ("cuda", "cpu"):
        raise NotSupported(f"device {chosen} is not supported; cuda and cpu are")
    return _indexed(chosen)


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_sizes(*sizes: str | int | float | None) -> None:
    """Say that a size cannot be read when it is given, not when the loop starts."""
    for size in sizes:
        if size is not None:
            parse_bytes(size, whole_bytes=1 << 62)


def _or_share(size: str | int | float | None, available_bytes: int, share: float) -> int:
    if size is None:
        return int(share * available_bytes)
    return parse_bytes(size, whole_bytes=available_bytes)


def _use_plain_segments() -> None:
    private.set_expandable_segments(False)


def _plain(tensor: torch.Tensor, kind: Kind) -> Iterator[tuple[torch.UntypedStorage, Kind]]:
    if tensor.layout is torch.strided and tensor.device.type != "meta":
        yield tensor.untyped_storage(), kind


def _bytes_in(*items: Any) -> int:
    total = 0
    for item in items:
        if isinstance(item, torch.Tensor):
            total += item.nbytes
        elif isinstance(item, (list, tuple)):
            total += _bytes_in(*item)
        elif isinstance(item, dict):
            total += _bytes_in(*item.values())
    return total


def _name(model: torch.nn.Module | None) -> str:
    return type(model).__name__ if model is not None else ""


def _show_log() -> None:
    """Make the few lines LMS writes visible where the program has not set logging up itself."""
    if not log.hasHandlers() and os.environ.get("TORCHLMS_LOG", "") != "off":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("torchlms: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
