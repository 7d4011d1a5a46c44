"""The public verbs: ``LMS`` around a loop, or ``enable`` and ``disable`` for a whole program."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from torchlms.check import check_step
from torchlms.core.bound import lower_bound
from torchlms.core.headroom import SMALLEST_PAGE_BYTES, page_bytes
from torchlms.core.machine import CopyTime, Machine
from torchlms.core.plan import Plan
from torchlms.core.rules import Rules
from torchlms.core.tape import Tape
from torchlms.director import Director
from torchlms.eager import private
from torchlms.eager.aside import Aside
from torchlms.eager.collector import SparedCollector
from torchlms.eager.engine import Engine
from torchlms.eager.install import Installation
from torchlms.eager.kinds import StorageKinds
from torchlms.eager.labels import ModuleLabels
from torchlms.eager.leaves import hand_back_leaves
from torchlms.eager.optimizer import OptimizerGuard
from torchlms.eager.verifier import Verifier
from torchlms.errors import NotSupported
from torchlms.loudness import show_log
from torchlms.memory import probe
from torchlms.memory.device import CpuDevice, CudaDevice, open_device
from torchlms.memory.limits import format_bytes, host_available_bytes
from torchlms.memory.spill_place import directory_for
from torchlms.memory.store import Store
from torchlms.options import Options, PlanSource, Size
from torchlms.report import report_text
from torchlms.statistics import session_stats
from torchlms.uninterrupted import uninterrupted

log = logging.getLogger("torchlms")

_current = threading.local()


class LMS:
    """Keeps a training loop within a device memory budget, without changing a bit of its results.

    The first step is recorded (slowly, but within the budget), the next two are timed under a first
    plan, and then the plan is made that is followed. If everything fits, LMS steps aside. Leaving
    the context, in whatever way, restores every hook, mode, memory limit and file; tensors that a
    graph still needs come home first.

    Promised: same losses, gradients, parameters and buffers as without LMS, and on CUDA that the
    caching allocator never reserves more than ``budget``. Not promised: speed in steps that differ
    from the recorded ones, and the budget once LMS stepped aside.

    ``budget``: bytes, ``"16GiB"``, ``"80%"`` of the device, or None for what the device has.
    ``host_budget``, ``disk_budget``: bytes for values off the device, 0 for none; None for nine tenths
    of what is free. ``disk_dir``: directory for the spill file. ``plan``: a Plan or the path of one, used
    after one recorded step instead of planning; False for no plan at all: values leave only when memory
    runs out. ``rules``: a Rules or a dict of its fields.
    ``recompute``: whether values may also be dropped and made again (None: as the rules say, which is yes).
    ``verify``: check in the first steps and in every so many (True: 100) that what comes back has the bits
    that left; such steps are slower. ``snapshot``: copy parameters and optimizer states to host memory
    before each optimizer step, so that one that fails is undone. ``device``: where the loop runs; None for
    where the model is.

    Raises BadOption, PlanMismatch, NotSupported on entering; BudgetTooSmall and HostBudgetTooSmall
    as soon as they are known.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        budget: Size = None,
        host_budget: Size = None,
        disk_dir: str | os.PathLike[str] | None = None,
        disk_budget: Size = None,
        plan: PlanSource = None,
        rules: Rules | dict[str, Any] | None = None,
        recompute: bool | None = None,
        verify: bool | int = False,
        snapshot: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self._options = Options.read(
            model,
            optimizer,
            device=device,
            budget=budget,
            host_budget=host_budget,
            disk_budget=disk_budget,
            disk_dir=disk_dir,
            plan=plan,
            rules=rules,
            recompute=recompute,
            verify=verify,
            snapshot=snapshot,
        )
        self._model = model
        self._kinds = StorageKinds(model, optimizer)
        self._guard = OptimizerGuard(optimizer, snapshot=snapshot)
        self._labels = ModuleLabels(model)
        self._undo = ExitStack()
        self._engine: Engine | None = None
        self._director: Director | None = None
        self._installation: Installation | None = None
        self._aside: Aside | None = None

    # -- entering and leaving ----------------------------------------------------------------

    def __enter__(self) -> LMS:
        other = current()
        if other is not None and not other._give_way():
            raise NotSupported(
                "LMS is on already in this thread: leave the other LMS, or call disable(), first"
            )
        if self._engine is not None:
            raise NotSupported("this LMS was used before; make a new one")
        show_log()
        device = open_device(self._options.torch_device)
        machine = measured_machine(device.torch_device, self._options.disk_dir)  # seconds, the first time
        try:
            # Nothing stays behind if opening fails half-way, or is interrupted.
            with uninterrupted(), ExitStack() as undo:
                self._open(undo, device, machine)
                self._undo = undo.pop_all()
                _current.lms = self
            return self
        except KeyboardInterrupt:
            self._leave()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._leave(error)
        except KeyboardInterrupt:
            self._leave(error)  # it may have come before it could be held back
            raise

    def _leave(self, error: BaseException | None = None) -> None:
        """Undo all of it, perhaps since ``error`` ends the loop; what was undone already stays so."""
        with uninterrupted():
            if getattr(_current, "lms", None) is self:
                _current.lms = None
            try:
                self._undo.close()
            except Exception as failure:
                if error is None:
                    raise
                # The loop's own error is the one to be seen.
                log.warning("while LMS was left, this went wrong as well: %s", failure)
        lost = self._engine.ladder.refusals.lost_in(error) if self._engine is not None else None
        if lost is not None:
            raise lost from error

    def _open(self, undo: ExitStack, device: CudaDevice | CpuDevice, machine: Machine) -> None:
        """Build and install everything; ``undo`` gets the opposite of each act, run last to first."""
        options = self._options
        tiers = options.tiers(**_room(device))
        store = Store(
            device,
            host_budget_bytes=tiers.host_bytes,
            disk_budget_bytes=tiers.disk_bytes,
            disk_dir=options.disk_dir,
        )
        undo.callback(store.close)
        collector = SparedCollector()
        collector.put_on(undo)
        self._kinds.label()
        undo.callback(self._kinds.unlabel)
        self._guard.put_on(undo)
        hand_back_leaves(undo)
        self._director = Director(
            machine=machine,
            budget=tiers,
            rules=options.rules,
            given=options.plan,
            model=self._model_name(),
            planning=options.planning,
            settled=collector.pass_by_more,
        )
        engine = Engine(
            device,
            store,
            budget_bytes=tiers.device_bytes,
            kinds=self._kinds.of,
            late_kinds=self._kinds.passing,
            prepare=self._director.prepare,
            collector=collector,
            begin_recording=self._begin_recording,
            module_here=self._labels.here,
            recompute=options.rules.recompute,
            held=options.rules.held,
            guard=self._guard,
            verifier=Verifier(options.verify_every) if options.verify_every else None,
        )
        # After the cap is lifted: values that come home may need more than the budget.
        undo.callback(engine.close)
        if isinstance(device, CudaDevice):
            _use_remappable_segments(undo, device, tiers.device_bytes, drops=self._options.rules.recompute)
        if isinstance(device, CpuDevice):
            for storage, _ in (*self._kinds.lasting(), *self._kinds.passing()):
                device.ledger.add(storage)
        device.cap(tiers.device_bytes)
        undo.callback(device.uncap)
        self._installation = Installation(engine)
        self._installation.put_on()
        undo.callback(self._installation.take_off)
        if isinstance(device, CudaDevice):  # a CPU is never left alone
            self._aside = Aside(engine, self._installation)
            if self._model is not None:
                self._aside.listen(self._model, undo)
        self._engine = engine

    def _model_name(self) -> str:
        return type(self._model).__name__ if self._model is not None else ""

    def _give_way(self) -> bool:
        """Whether this LMS closed itself in favour of one that the program opens."""
        return False

    def _unseen(self) -> AbstractContextManager[None]:
        """For ops that are no part of training, such as those of a trainer's log: LMS has no business there,
        and they take half of the time without it."""
        return private.without_modes()

    def _over(self) -> bool:
        """Whether this LMS has ended, perhaps in another thread than the one it was opened in."""
        return self._engine is not None and self._engine.dead

    # -- while it runs -----------------------------------------------------------------------

    def _begin_recording(self, step: int) -> None:
        assert self._engine is not None
        log.info(
            "recording step %d on %s, budget %s; a step being recorded is slow",
            step,
            self._engine.device.torch_device,
            format_bytes(self._engine.ladder.budget_bytes),
        )

    def set_budget(self, budget: Size) -> None:
        """Change the device budget from here on, because another program needs memory or gave some back.

        What must leave leaves at once, and the next steps get new plans; nothing is recorded again. Raises
        BudgetTooSmall, and changes nothing, if what is in use and cannot leave takes more.
        """
        engine, director = self._engine, self._director
        if engine is None or director is None or engine.dead:
            raise NotSupported("set_budget() needs an LMS that is on: call it inside the with block")
        options = replace(self._options, budget=budget, plan=None)
        device_bytes = options.device_bytes(**_room(engine.device))
        engine.shrink_to(device_bytes)
        # The other tiers stay: what waits there now is ours, and no longer among what is free.
        director.rebudget(replace(director.budget, device_bytes=device_bytes))
        engine.routines.plan_again()
        if self._aside is not None:
            self._aside.end()
        log.info("the budget is %s from here on", format_bytes(device_bytes))

    def reclaim(self) -> int:
        """Have everything leave the device that can, now; returns the bytes freed. It comes back when it is
        needed. Saved tensors that somebody else holds, too, cannot leave."""
        if self._engine is None or self._engine.dead:
            raise NotSupported("reclaim() needs an LMS that is on: call it inside the with block")
        return self._engine.reclaim()

    # -- checking ----------------------------------------------------------------------------

    def check(self, step: Callable[[], torch.Tensor]) -> int:
        """Run ``step`` plainly, and once more with everything away between forward and backward; compare.

        ``step`` runs forward and backward of one batch that fits in the budget plainly, and returns the
        loss; it must not call an optimizer. Gradients, buffers and random generators are then as before.
        Returns how many values left and came back. Raises VerifyFailed unless loss, gradients and buffers
        have the same bits, NotSupported if ``step`` run plainly differs from itself or nothing could leave.
        """
        if self._engine is None or self._installation is None or self._engine.dead:
            raise NotSupported("check() needs an LMS that is on: call it inside the with block")
        if self._model is None:
            raise NotSupported("check() compares gradients: give LMS the model")
        return check_step(step, self._model, self._engine, self._installation)

    # -- asking ------------------------------------------------------------------------------

    @property
    def tape(self) -> Tape | None:
        """The tape of the steps that there are most of, or None before the first recorded step has ended."""
        return self._engine.routines.usual_tape() if self._engine is not None else None

    @property
    def plan(self) -> Plan | None:
        """The plan of the steps that there are most of, or None before there is one."""
        return self._engine.routines.usual_plan() if self._engine is not None else None

    @property
    def machine(self) -> Machine | None:
        """The measured rates that plans are made with, or None before LMS is entered."""
        return self._director.machine if self._director is not None else None

    @property
    def rules(self) -> Rules:
        """What was asked for of what may leave."""
        return self._options.rules

    @property
    def state(self) -> str:
        """``"off"``, ``"record"``, ``"guard"``, ``"improvise"`` (on, without a plan) or ``"aside"``."""
        if self._aside is not None and self._aside.on:
            return "aside"
        if self._engine is None or self._engine.dead:
            return "off"
        if self._engine.routines.improvises():
            return "improvise"
        return "guard" if self._engine.routines.plans() and self._engine.now.recorder is None else "record"

    def stats(self) -> dict[str, Any]:
        """What happened so far, as plain numbers; the keys are those of ``torchlms bench --json``."""
        found = session_stats(self._engine, state=self.state)
        if self._director is None or self._engine is None:
            return found
        return found | {"racing": self._director.racing(self._engine)}

    def report(self) -> str:
        """What was decided, why, what was predicted and what was measured, as text."""
        return report_text(self.stats(), self.tape, self.plan, self._bound_s(), self.rules)

    def _bound_s(self) -> float | None:
        """A step time that no plan can beat, as far as tape, machine and plan are known."""
        tape, machine, plan = self.tape, self.machine, self.plan
        if tape is None or machine is None or plan is None:
            return None
        return lower_bound(tape, machine, plan.budget, recompute=self._options.rules.recompute)


def enable(
    model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> LMS:
    """Turn LMS on for the rest of the program, in this thread; same options as ``LMS``.

    Without ``model`` LMS cannot tell parameters from activations by name, never steps aside, and
    keeps guarding; everything else is the same.
    """
    return LMS(model, optimizer, **options).__enter__()


def disable() -> None:
    """Undo ``enable``; does nothing if LMS is off in this thread."""
    lms = current()
    if lms is not None:
        lms.__exit__(None, None, None)


def current() -> LMS | None:
    """The LMS that is on in this thread, unless it was left in another one."""
    lms: LMS | None = getattr(_current, "lms", None)
    return lms if lms is not None and not lms._over() else None


def stats() -> dict[str, Any]:
    """``LMS.stats`` of the LMS that is on in this thread; ``{"state": "off"}`` if none is."""
    lms = current()
    return lms.stats() if lms is not None else {"state": "off"}


def reclaim() -> int:
    """``LMS.reclaim`` of the LMS that is on in this thread; nothing if none is."""
    lms = current()
    return lms.reclaim() if lms is not None else 0


def measured_machine(
    device: torch.device,
    disk_dir: str | os.PathLike[str] | None = None,
    *,
    refresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Machine:
    """What this machine can do, from the cache or measured now (seconds)."""
    found = probe.load_or_measure(device, directory_for(disk_dir), refresh=refresh, progress=progress)
    fields = dataclasses.asdict(found)
    fields["link"] = tuple(CopyTime(*point) for point in found.link)
    return Machine(**fields)


def _room(device: CudaDevice | CpuDevice) -> dict[str, int]:
    """What the device has, and what of that is to be had."""
    if isinstance(device, CudaDevice):
        return {"whole_bytes": device.total_bytes, "available_bytes": device.available_bytes()}
    return dict.fromkeys(("whole_bytes", "available_bytes"), host_available_bytes())


def _use_remappable_segments(undo: ExitStack, device: CudaDevice, budget_bytes: int, *, drops: bool) -> None:
    """Back new device memory by remappable pages, so that holes between tensors can be closed."""
    before = private.expandable_segments()
    torch.cuda.empty_cache()
    granted_bytes = private.set_expandable_segments(True, page_bytes(budget_bytes, drops=drops))
    device.page_bytes = granted_bytes or SMALLEST_PAGE_BYTES
    undo.callback(private.set_expandable_segments, before)
