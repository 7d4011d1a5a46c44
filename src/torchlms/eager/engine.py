"""Engine: gives the saved tensors of one thread's program their places, one micro-step after another.

It owns what lasts; `MicroStep` is what lasts one lap, `Watcher` runs the ops, `Saver` is asked by autograd.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

from torchlms.core.tape import Kind, Phase
from torchlms.eager import private
from torchlms.eager.accounts import Accounts
from torchlms.eager.collector import SparedCollector
from torchlms.eager.convolution import ConvolutionRoom
from torchlms.eager.counts import Counts
from torchlms.eager.follower import Follower
from torchlms.eager.holes import Holes
from torchlms.eager.ladder import EVERYTHING_BYTES, Ladder
from torchlms.eager.lent import Lent, tried
from torchlms.eager.microstep import MicroStep
from torchlms.eager.optimizer import OptimizerGuard
from torchlms.eager.orphans import Bereft, Orphan
from torchlms.eager.owner import SlotOwner
from torchlms.eager.program import Program
from torchlms.eager.proof import Prover
from torchlms.eager.provenance import Provenance
from torchlms.eager.recipe import Recipe
from torchlms.eager.recorder import Recorder
from torchlms.eager.replay import replay
from torchlms.eager.routine import Routine, Signature, Verdict
from torchlms.eager.routines import Routines
from torchlms.eager.saver import Saver
from torchlms.eager.sizes import ResultSizes
from torchlms.eager.slot import Slot, Where
from torchlms.eager.tensors import new_bytes
from torchlms.eager.timer import Lap, OpTimer
from torchlms.eager.verifier import Verifier
from torchlms.eager.watcher import Watcher
from torchlms.errors import ReplayFailed
from torchlms.memory.device import Copy, CpuDevice, CudaDevice
from torchlms.memory.store import Place, Store

log = logging.getLogger("torchlms")

_KEPT_TIMES = 1000
_FITTING_SHARE = 0.97  # of the budget; the rest is for holes


class Engine(SlotOwner):
    """The moving parts of one ``LMS``; knows nothing of how plans are made."""

    def __init__(
        self,
        device: CudaDevice | CpuDevice,
        store: Store,
        *,
        budget_bytes: int,
        kinds: Callable[[torch.UntypedStorage], Kind | None],
        late_kinds: Callable[[], Iterable[tuple[torch.UntypedStorage, Kind]]],
        prepare: Callable[[Engine, Routine], None],
        begin_recording: Callable[[int], None],
        module_here: Callable[[], str],
        collector: SparedCollector | None = None,
        recompute: bool = False,
        held: bool = False,
        verifier: Verifier | None = None,
        guard: OptimizerGuard | None = None,
    ) -> None:
        self.device = device
        self.store = store
        self.kinds = kinds
        self.late_kinds = late_kinds
        self.prepare = prepare
        self.begin_recording = begin_recording
        self.module_here = module_here
        self.collector = collector if collector is not None else SparedCollector()
        self.recompute = recompute
        self.held = held
        self.lent = Lent(self)
        self.verifier = verifier
        self.guard = guard if guard is not None else OptimizerGuard(None)
        self.guard.may_look_away = self._may_look_away
        self.sizes = ResultSizes()
        self.rooms = ConvolutionRoom(self.sizes)
        self.holes = Holes(device, self)
        self.ladder = Ladder(
            device,
            store,
            self,
            self.sizes,
            budget_bytes,
            collect=self.collector.look_everywhere,
            forget=self._forget_calls,
            give_back=self.holes.untuck,
        )
        self.accounts = Accounts(device, self.ladder)
        self.prover = Prover(self)
        self.watcher = Watcher(self)
        self.saver = Saver(self)
        self.now = MicroStep()
        self.routines = Routines()
        self.orphans: deque[Orphan | Bereft] = deque()  # died with a copy in flight
        self.dropped: set[int] = set()  # slots, by identity
        self.steps = 0  # micro-steps begun
        self.step_times_s: deque[float] = deque(maxlen=_KEPT_TIMES)  # of micro-steps that followed a plan
        self.late_fetches = 0
        self.comings = 0  # values that were away and are back
        self.replays = 0  # ops that ran again
        self.counted_from = Counts()  # what had been when measuring began
        self.dead = False  # closed, or inherited through a fork
        self.starved_aside = False  # left alone, it did not fit: not again
        self._live: dict[int, weakref.ref[Slot]] = {}
        self._spare: dict[int, weakref.ref[Slot]] = {}  # those that no saved tensor has
        self._ooms_aside = 0
        _ENGINES.add(self)

    # -- micro-steps -------------------------------------------------------------------------

    def begins_microstep(self, tensor: torch.Tensor, *, stays: bool = False) -> bool:
        """Whether ``tensor``, which is saved now, is the first of another micro-step (see microstep.py).
        ``stays``: it is of those that never move."""
        if self.steps == 0:
            return True
        if private.in_backward():
            return False  # saved by a backward pass that is itself differentiable
        now = self.now
        if now.routine is None:
            return True
        if not now.ordinal and not now.backward_seen:  # begun by what stays: it goes on while that lives
            return stays and now.opened_by is not None and now.opened_by() is None
        if not self._live:
            return True
        return now.backward_seen and not now.graph.goes_on_to(tensor, self.guard.steps)

    def begin_microstep(self, first: torch.Tensor) -> None:
        """Close the one before; find out what kind of step this is, and do with it as was decided."""
        before = self.now.graph
        self.end_microstep()
        for slot in self.living():  # of a graph that outlives its micro-step: strange to the next tape
            slot.value = slot.ordinal = -1
        signature = Signature(tuple(first.shape), first.dtype, self.module_here(), self.saver.forget_met())
        routine = self.routines.of(signature)
        routine.met(self.steps)
        self.prepare(self, routine)
        self.ladder.refusals.begin_step(routine.refused_bytes)
        self.steps += 1
        self.guard.outside()
        now = self.now = MicroStep(routine, before)
        now.provenance = self._new_provenance(routine)
        program: Program | None = None
        if routine.verdict is Verdict.RECORD and routine.worth_recording():
            self._begin_to_record(now)
        elif routine.verdict is Verdict.FOLLOW:
            program = routine.program
            now.timer = OpTimer(self.device) if routine.wants_times else None
        timed = routine.wants_lap and program is not None and program.actions
        now.lap = Lap(self.device) if timed else None
        self.holes.begin_step(program)
        now.learning = self.holes.learning
        now.plainly = self.device.is_cuda and now.recorder is None and now.timer is None
        self.rooms.begin_step()
        self.ladder.begin_step()
        if self.verifier is not None:
            self.verifier.begin_step(self.steps)
        now.ooms_before = self.hidden_ooms()
        if program is not None:
            now.follower = Follower(
                program, now.by_ordinal, self.store, self.holes, now.provenance, self.prover.prove
            )
        now.look_ahead()

    def _begin_to_record(self, now: MicroStep) -> None:
        self.begin_recording(self.steps)
        now.recorder = Recorder(self.device, self.kinds, now.provenance)
        now.recorder.module = self.module_here()
        if now.provenance is not None:
            now.provenance.value_of = self.saver.value_to_hold

    def _new_provenance(self, routine: Routine) -> Provenance | None:
        """Provenance is kept while recording, and where the program drops something."""
        drops = routine.program is not None and routine.program.drops
        recording = routine.verdict is Verdict.RECORD
        if not self.recompute or not (recording or (drops and routine.verdict is Verdict.FOLLOW)):
            return None
        return Provenance(
            device=self.device.torch_device,
            kinds=self.kinds,
            hold=self.saver.hold,
            hollow=self.saver.hollow,
        )

    def settle(self) -> None:
        """Between two forward passes: plan what is ready, without waiting for the next saved tensor."""
        routine = self.now.routine
        if routine is None or not self.now.backward_seen or private.in_backward():
            return
        self.end_microstep()
        self.prepare(self, routine)

    def end_microstep(self, *, closing: bool = False) -> None:
        """Close the micro-step that ran until now: keep its tape, or how well it kept to the plan."""
        past, self.now = self.now, MicroStep(before=self.now.graph)
        self.holes.end_step()
        if past.routine is None:
            return
        self._warn_of_starved(past)
        if past.provenance is not None and not self.dropped:
            past.provenance.forget()
        if past.recorder is not None:
            self._keep_tape(past.recorder, past.routine, whole=past.backward_seen)
        elif past.strayed:
            if past.backward_seen and not closing:
                past.routine.stray()
        elif past.follower is not None:
            past.routine.followed(past.lap)
            if self.prover.tried and not closing:  # a last step that was not alone is better than none
                self.restart_measuring()
                self.prover.tried = False
            if past.timer is not None:
                past.routine.timed(past.timer.times())
            self.step_times_s.append(time.perf_counter() - past.began_s)
        self.collector.look_now()

    def _keep_tape(self, recorder: Recorder, routine: Routine, *, whole: bool) -> None:
        # A backward pass that raised never ended: its tape is half a step, and the next one is recorded.
        if whole and recorder.phase is not Phase.BACKWARD:
            recorder.reclassify(self.late_kinds())
            routine.recorded(recorder.finish())
        elif not whole:
            routine.unfinished += 1
        recorder.closed = True
        self.store.close_empty_slabs()

    def _warn_of_starved(self, past: MicroStep) -> None:
        """Failed allocations that raised nowhere: a library swallowed them and took another way."""
        starved = max(0, self.hidden_ooms() - past.ooms_before)
        if starved:
            self.rooms.starved += starved
            log.warning(
                "%d allocations failed inside a library that then took another way, perhaps a slower one: "
                "the budget leaves no room for the workspace of some convolution",
                starved,
            )

    def _forget_calls(self, refusing: bool) -> None:
        """Memory has run out: let go of the calls of this lap, if no recipe needs them any more. They hold
        parameters and buffers as they were read, also where the program has put others in their place.
        Before a refusal a tape may do without recipes as well."""
        now = self.now
        spent = now.backward_seen or (refusing and now.recorder is not None)
        needed = self.dropped or self.prover.busy
        if now.provenance is not None and spent and not needed:
            now.provenance.forget()

    def restart_measuring(self) -> None:
        """Peaks and counters from here on are those of planned steps."""
        if self.device.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device.torch_device)
        elif isinstance(self.device, CpuDevice):
            self.device.ledger.reset_peak()
        self.step_times_s.clear()
        self.counted_from = Counts.of(self)

    def _may_look_away(self) -> bool:
        """Whether the optimizer's step may run unseen: no recipe reads what it writes, and by the tape it
        has so much room that it cannot run out."""
        follower = self.now.follower
        if not self.device.is_cuda or follower is None or not self.now.backward_seen:
            return False
        if self.dropped or self.lent:
            return False
        self.guard.timer = self.now.timer
        return follower.program.roomy_at_end

    def hidden_ooms(self, *, here: bool = False) -> int:
        """Failed allocations of which nobody heard, for whoever asked took another way, in any thread or
        ``here`` in this one; only differences count."""
        return self._allocator_ooms(here=here) - self.ladder.ooms - self.holes.ooms

    def _allocator_ooms(self, *, here: bool = False) -> int:
        return private.allocator_ooms(self.device.torch_device, here=here) if self.device.is_cuda else 0

    # -- SlotOwner ---------------------------------------------------------------------------

    def allocate(self, size_bytes: int, *, early: bool = False) -> torch.Tensor:
        if self.dead:  # at the end everything comes home, and the budget is no longer promised
            return new_bytes(size_bytes, self.device.torch_device)
        target = self.ladder.allocate(size_bytes, self.lent.operands, early=early)
        self.accounts.add(target)
        return target

    def start_out(self, source: torch.Tensor, place: Place) -> Copy:
        return self.store.copy_out(source, place)

    def start_in(self, place: Place, target: torch.Tensor, after: Copy | None) -> Copy:
        return self.store.copy_in(place, target, after)

    def finish_copies(self) -> None:
        self.store.finish()

    def lends(self, slot: Slot) -> None:
        self.lent.add(slot)

    def regained(self, slot: Slot) -> None:
        self.lent.discard(slot)

    def resized(self, tensor: torch.Tensor) -> None:
        self.accounts.add(tensor)

    def may_lend(self, slot: Slot) -> bool:
        """Whether the slot may leave in an emergency although the program holds it: what an op of this
        forward pass has made. Older tensors are the program's own, to be saved or shown at any moment; and in
        a backward pass autograd's own code has tensors in its hands between two ops."""
        if not self.held or self.now.backward_seen:
            return False
        if self.now.follower is None:
            return self.lent.made_in(slot, self.steps)
        expected = self.now.follower.program.expected.get(slot.ordinal)
        return expected is not None and expected.made

    def adopt(self, orphan: Orphan | Bereft) -> None:
        if not self.dead:
            self.orphans.append(orphan)
        elif not isinstance(orphan, Bereft):
            orphan.bury()  # closed: all copies have ended, and nobody comes by any more

    def bury(self) -> None:
        """Let go of what finalizers left: here, on the program's own thread and stream, we may wait."""
        while self.orphans:
            orphan = self.orphans.popleft()
            if isinstance(orphan, Bereft):
                self.lent.keep(orphan)
            else:
                orphan.bury()

    def remake(self, slot: Slot, recipe: Recipe) -> torch.Tensor:
        """Make a slot's bytes again. Where that fails they are not dropped any more from the next step on."""
        try:
            return self.replay(recipe)
        except ReplayFailed as error:
            if self.now.follower is not None:
                self.now.follower.program.fail(slot.ordinal)
            raise ReplayFailed(
                f"{self._name_of(slot)} was dropped and cannot be made again: {error}. Run this step again: "
                "plans from here on let the value be. recompute=False drops nothing at all"
            ) from None

    def replay(self, recipe: Recipe) -> torch.Tensor:
        """Run a recipe: a tensor in what it makes."""
        lap = self.now.lap
        if lap is None:
            return replay(recipe, self.watcher.run_again)
        began_s, values_s, again_s = time.perf_counter(), lap.values_s, lap.again_s
        made = replay(recipe, self.watcher.run_again)
        # What it took to bring its sources back, or to make them again, is part of it.
        lap.values_s, lap.again_s = values_s, again_s + time.perf_counter() - began_s
        return made

    def leaving(self, slot: Slot) -> None:
        if self.now.recorder is not None:
            self.now.recorder.leaving(slot)
        if self.verifier is not None and self.verifier.on:
            self.verifier.leaving(slot, self.now.clock)

    def back(self, slot: Slot) -> None:
        self.comings += 1
        if self.verifier is not None:
            self.verifier.back(slot, self.now.clock, self._name_of)

    def _name_of(self, slot: Slot) -> str:
        """What the tape says of a slot, in words."""
        tape = self.now.follower.program.tape if self.now.follower is not None else None
        for value in tape.values if tape is not None and slot.ordinal >= 0 else ():
            if value.saved == slot.ordinal:
                module = f" in {value.module}" if value.module else ""
                return f"saved value {slot.ordinal}, made by {value.op or value.kind.value}{module},"
        return f"saved value {slot.ordinal}"

    def moved(self, slot: Slot) -> None:
        if slot.where is Where.DROPPED:
            self.dropped.add(id(slot))
        else:
            self.dropped.discard(id(slot))
        if self.now.recorder is not None:
            self.now.recorder.moved(slot)

    def enrolled(self, slot: Slot) -> None:
        """Autograd has saved a tensor of the slot, which from here on may leave."""
        self._spare.pop(id(slot), None)
        self._live[id(slot)] = weakref.ref(slot)

    def held_for_recipes(self, slot: Slot) -> None:
        """Recipes will read the slot, and nobody else: it leaves only where memory runs out."""
        self._spare[id(slot)] = weakref.ref(slot)

    def forget(self, slot: Slot) -> None:
        self._live.pop(id(slot), None)
        self._spare.pop(id(slot), None)
        self.lent.discard(slot)
        self.dropped.discard(id(slot))
        if self.now.recorder is not None:
            self.now.recorder.forgotten(slot)

    def living(self) -> Iterator[Slot]:
        yield from _there(self._live)

    def spare(self) -> Iterator[Slot]:
        yield from _there(self._spare)

    # -- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Bring home what is still away, so that graphs that outlive us stay whole; idempotent."""
        if self.dead:
            return
        try:
            self.end_microstep(closing=True)
        finally:
            self.dead = True
            failures = list(filter(None, map(_bring_home, self.living())))
            self.bury()
            failures += filter(None, [tried(self.lent.recall)])
        if failures:
            raise failures[0]

    def leave_alone(self) -> None:
        """The program is going to run without us."""
        self.end_microstep()
        with private.unwatched():
            self.bury()
            self.lent.recall()
        self._ooms_aside = self._allocator_ooms()

    def failed_alone(self) -> bool:
        """Whether an allocation has failed since ``leave_alone``: it did not fit after all."""
        self.starved_aside = self._allocator_ooms() > self._ooms_aside
        return self.starved_aside

    def outgrown(self) -> bool:
        """Whether what fitted may fit no more, because more memory is in use before a step than was."""
        if not self.device.is_cuda:
            return False
        needs_bytes = self.device.allocated_bytes() + self.routines.rise_bytes()
        return needs_bytes > _FITTING_SHARE * self.ladder.budget_bytes

    def shrink_to(self, budget_bytes: int) -> None:
        """Have another budget, and keep to it from now on. BudgetTooSmall if what cannot leave needs more."""
        with private.unwatched():
            self._shrink_below(budget_bytes)
        self.device.cap(budget_bytes)
        self.ladder.budget_bytes = budget_bytes

    def _shrink_below(self, budget_bytes: int) -> None:
        """Have as much leave as it takes. Pages that are free in part count in full, so that more may have
        to leave than is too much."""
        over_bytes = self.device.held_bytes() - budget_bytes
        while over_bytes > 0 and self.ladder.reclaim(over_bytes):
            over_bytes = self.device.held_bytes() - budget_bytes

    def inactive_bytes(self) -> int:
        """On the device, and could leave it at once."""
        return sum(slot.size_bytes for slot in (*self.living(), *self.spare()) if slot.alone())

    def reclaim(self) -> int:
        """Have everything leave that can; returns the bytes freed."""
        with private.unwatched():
            return self.ladder.reclaim(EVERYTHING_BYTES)


def _there(slots: dict[int, weakref.ref[Slot]]) -> Iterator[Slot]:
    for reference in list(slots.values()):
        slot = reference()
        if slot is not None:
            yield slot


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _drop_in_child() -> None:
    """A forked worker inherits the mode but none of the device's work: it must pass everything by."""
    for engine in list(_ENGINES):
        engine.dead = True


os.register_at_fork(after_in_child=_drop_in_child)


def _bring_home(slot: Slot) -> Exception | None:
    """Have the slot's bytes on the device for good; the error that this led to."""
    return tried(slot.take) or tried(slot.stay)
