"""Engine: watches the ops of one thread's program and gives its saved tensors their places.

[Note: Micro-steps]
A micro-step is a forward pass with the backward passes over it, and whatever follows (optimizer,
data, evaluation) until the next forward pass saves its first tensor. Accumulation, several losses
and evaluation loops in between need no special treatment: each micro-step is one lap of the tape.

A new micro-step begins when a tensor is saved outside any backward pass and either a backward
pass has run since the last beginning or nothing saved since then is alive any more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from torchlms.core.plan import Plan
from torchlms.core.tape import Kind, Phase, Tape
from torchlms.eager import private
from torchlms.eager.convolution import ConvolutionRoom
from torchlms.eager.follower import Follower
from torchlms.eager.holes import Holes
from torchlms.eager.ladder import Ladder, asked_bytes, starved_engine
from torchlms.eager.optimizer import OptimizerGuard
from torchlms.eager.program import Program
from torchlms.eager.provenance import Provenance, Recipe, readers_of, writes_anything
from torchlms.eager.recorder import Recorder
from torchlms.eager.replay import replay
from torchlms.eager.routine import TIMINGS, Routine, Signature, Verdict
from torchlms.eager.saved import Kept, Saved, memoryless_alias
from torchlms.eager.sizes import ResultSizes
from torchlms.eager.slot import Orphan, Slot, SlotOwner, Where, find
from torchlms.eager.tensors import is_plain, tensors_in
from torchlms.eager.timer import Lap, OpTimer
from torchlms.eager.traits import careful_ops, makes_cpu_tensors, name_of, rewind_of, writes_list
from torchlms.eager.verifier import Verifier
from torchlms.errors import HostBudgetTooSmall, LMSError, SpillError, StepTorn
from torchlms.memory.device import Copy, CpuDevice, CudaDevice
from torchlms.memory.store import Place, Store

log = logging.getLogger("torchlms")

_OWN_DISPATCH_FREE = (torch.Tensor, torch.nn.Parameter)
_CPU_ALIGNMENT = 64
_MOST_ROUTINES = 32
_MOST_MET = 3
_KEPT_TIMES = 1000
_FITTING_SHARE = 0.97  # of the budget; the rest is for holes
EVERYTHING_BYTES = 1 << 62
_COMPARED_BYTES = 32 << 20  # at a time
_LEAST_BYTES = 512  # saved tensors below this never move and are not worth a slot


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
        recompute: bool = False,
        verifier: Verifier | None = None,
        guard: OptimizerGuard | None = None,
    ) -> None:
        self.recompute = recompute
        self.verifier = verifier
        self.guard = guard if guard is not None else OptimizerGuard(None)
        self.guard.may_look_away = self._may_look_away
        self.empty_before_backward = False  # everything that may leaves before the next backward pass
        self.device = device
        self.store = store
        self.sizes = ResultSizes()
        self.rooms = ConvolutionRoom(self.sizes)
        self.ladder = Ladder(device, store, self, self.sizes, budget_bytes)
        self.holes = Holes(device, self)
        self.kinds = kinds
        self.late_kinds = late_kinds
        self.prepare = prepare
        self.begin_recording = begin_recording
        self.module_here = module_here
        self.routines: dict[Signature, Routine] = {}
        self.routine: Routine | None = None
        self.recorder: Recorder | None = None
        self.follower: Follower | None = None
        self.timer: OpTimer | None = None
        self.orphans: deque[Orphan] = deque()  # died with a copy in flight
        self.steps = 0  # micro-steps begun
        self.step_times_s: deque[float] = deque(maxlen=_KEPT_TIMES)  # of micro-steps that followed a plan
        self.late_fetches = 0
        self.comings = 0  # values that were away and are back
        self.replays = 0  # ops that ran again
        self._proving = False  # recipes have been tried in this micro-step, which took moves
        self.provenance: Provenance | None = None
        self.counted_from = (0, 0, 0, 0)  # steps, bytes out, in and to disk when measuring began
        self.dead = False  # closed, or inherited through a fork
        self._live: dict[int, weakref.ref[Slot]] = {}
        self._by_ordinal: dict[int, weakref.ref[Slot]] = {}
        self._dropped: set[int] = set()  # by identity
        self._ooms = 0
        self._ooms_aside = 0
        self.starved_aside = False  # left alone, it did not fit: not again
        self._ordinal = 0
        self._clock = 0
        self._lap: Lap | None = None
        self._met: tuple[tuple[int, ...], ...] = ()
        self._plainly = False  # ops only need an eye on running out of memory
        self._careful = careful_ops(self.rooms)
        self._quiet: list[Any] = []  # of the program that is followed
        self._quiet_until = 0  # before this op nothing is due
        self._backward_seen = False
        self._strayed = False
        self._began_s = 0.0
        self._hollows: dict[torch.dtype, torch.Tensor] = {}
        _ENGINES.add(self)

    # -- ops ---------------------------------------------------------------------------------

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op: act on the plan, make room, survive running out."""
        clock = self._clock
        quiet = clock < self._quiet_until and self._quiet[clock] is func
        if quiet and not self.orphans and not self.guard.inside:
            return self._run_quietly(func, args, kwargs)
        if self.dead:
            return func(*args, **kwargs)
        if not self.guard.inside:
            return self._watch(func, args, kwargs)
        try:
            return self._watch(func, args, kwargs)
        except (LMSError, torch.OutOfMemoryError) as error:
            failure = error.with_traceback(None)  # its frames hold the op's tensors
        raise self.guard.torn(failure)

    def _run_quietly(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op that needs no more than an eye on running out of memory."""
        self._clock += 1
        try:
            return func(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            want_bytes = self._heard(error)
        return self.ladder.retry(func, args, kwargs, self._where, want_bytes)

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.orphans:
            self._bury()
        if self.follower is not None and self._clock >= self.follower.due:
            self.follower.catch_up(self._clock)
            self._look_ahead()
        writes = writes_anything(func)
        if self._dropped and writes:
            self._make_readers_real(func, args, kwargs)
        provenance = self.provenance
        if provenance is None or (self._backward_seen and not writes):
            self._note_quiet(func, writes=writes)
            return self._run(func, args, kwargs)
        if self.follower is not None and self.follower.program.leaves_out(self._clock, name_of(func)):
            self._note_quiet(func, writes=writes)
            result = self._run(func, args, kwargs)
            if writes:
                provenance.written(func, args, kwargs, self._clock)
            return result
        call = provenance.before(func, args, kwargs, self._clock, forward=not self._backward_seen)
        if self.follower is not None and self._clock in self.follower.program.holding:
            provenance.hold(self._to_hold(self.follower.program, func, args, kwargs))
        result = self._run(func, args, kwargs)
        provenance.after(call, args, kwargs, result)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._plainly and not self._careful(func):
            return self._run_quietly(func, args, kwargs)
        self._make_room(func, args, kwargs)
        if self.recorder is not None:
            result = self._run_recorded(self.recorder, func, args, kwargs)
        elif self.device.is_cuda and self.rooms.concerns(func) and not self.rooms.knows(func, args):
            result = self._run_new_convolution(func, args, kwargs)
        elif self.timer is not None:
            self.timer.begin()
            result = self._attempt(func, args, kwargs)
            self.timer.end(func)
        else:
            result = self._attempt(func, args, kwargs)
        if not self.device.is_cuda:
            self._count(result)
            self.sizes.prove(args, kwargs, result)
        elif self.holes.learning:
            self.holes.note(self._clock)
        self._clock += 1
        return result

    def _note_quiet(self, func: Any, *, writes: bool) -> None:
        """Here the program runs ``func``, and nobody needs to know: next time it is only run."""
        heeded = self.guard.inside or (writes and self.recompute)
        if self._plainly and self._clock < len(self._quiet) and not heeded and not self._careful(func):
            self._quiet[self._clock] = func

    def _look_ahead(self) -> None:
        """Until which op there is nothing to do but to run those that are known to be quiet."""
        follower = self.follower if self._plainly and not self.dead else None
        self._quiet = follower.program.quiet if follower is not None else []
        self._quiet_until = min(follower.due, len(self._quiet)) if follower is not None else 0

    def _to_hold(
        self, program: Program, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Of what ``func`` is about to read, what the tape says some recipe needs held."""
        op, device = program.tape.ops[self._clock], self.device.torch_device
        tensors = [tensor for tensor in tensors_in(args, kwargs) if tensor.device == device]
        if op.name != name_of(func) or len(op.reads) != len(tensors):
            return []
        wanted = program.holding[self._clock]
        return [tensor for tensor, value in zip(tensors, op.reads, strict=True) if value in wanted]

    def _make_readers_real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before ``func`` writes: make again what would later be made from what it overwrites."""
        for slot in readers_of(func, args, kwargs):
            if slot.where is Where.DROPPED:
                slot.take()

    def _run_again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One op of a recipe: within the budget like any other, but no part of the program."""
        if self.dead:
            return func(*args, **kwargs)
        self._make_room(func, args, kwargs)
        result = self._attempt(func, args, kwargs)
        self.replays += 1
        if not self.device.is_cuda:
            self._count(result)
        return result

    def _heard(self, error: BaseException) -> int:
        self.ladder.ooms += 1
        self.holes.untuck()
        return asked_bytes(error)

    def _where(self) -> str:
        """The module whose op runs now, by the stack, else by what is being recorded, or by the tape."""
        module = self.module_here()
        if module or (self.recorder is None and self.follower is None):
            return module
        if self.follower is None:
            return self.recorder.module if self.recorder is not None else ""
        ops = self.follower.program.tape.ops
        return ops[min(self._clock, len(ops) - 1)].module if ops else ""

    def _make_room(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.device.is_cuda:
            self._discover(tensors_in(args, kwargs))
            if makes_cpu_tensors(args, kwargs):
                self.ladder.enter_in_ledger(func, args, kwargs, self._where)
        elif self.rooms.concerns(func):
            self.ladder.reserve(self.rooms.need(func, args, kwargs))

    def _attempt(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rewind = rewind_of(self.device, func, kwargs)
        try:
            return func(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            want_bytes = self._heard(error)
            if writes_list(func):
                raise self._torn(func, error) from None
        except RuntimeError as error:
            if not (self.rooms.concerns(func) and starved_engine(error)):
                raise
            want_bytes = 0

        def begin_again() -> None:
            if rewind is not None:
                rewind()
            if self.recorder is not None:
                self.recorder.begin_again()
            if self.timer is not None:
                self.timer.begin()

        # Outside the handler: the exception's frames hold the op's tensors.
        return self.ladder.retry(func, args, kwargs, self._where, want_bytes, begin_again)

    def _torn(self, func: Any, error: torch.OutOfMemoryError) -> Exception:
        """What to raise when memory ran out inside an op that may have changed some of its list already."""
        if self.guard.inside:
            return error
        return StepTorn(
            f"{func} ran out of memory and may have updated some of its tensors but not others ({error}): "
            "give this step up (zero_grad) and run it again, with a larger budget or with foreach=False",
            restored=False,
        )

    def _run_recorded(
        self, recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        module = self.module_here()
        if module or recorder.phase is not Phase.BACKWARD:
            recorder.module = module
        recorder.before(args, kwargs)
        try:
            result = self._attempt(func, args, kwargs)
        except BaseException:
            recorder.abandon()
            raise
        recorder.after(func, result)
        if self.device.is_cuda and self.rooms.concerns(func):
            self.rooms.learn(func, args, kwargs, recorder.scratch_bytes)
        return result

    def _run_new_convolution(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A shape first met outside a recording: see what it takes, so that next time it is known."""
        device = self.device.torch_device
        torch.cuda.reset_peak_memory_stats(device)
        before = private.allocator_stats(device)["allocated_bytes"]["all"]["current"]
        result = self._attempt(func, args, kwargs)
        peak = private.allocator_stats(device)["allocated_bytes"]["all"]["peak"]
        fresh_bytes = sum(self.sizes.of(func, args, kwargs))
        self.rooms.learn(func, args, kwargs, max(0, int(peak) - int(before) - fresh_bytes))
        return result

    def _discover(self, tensors: list[torch.Tensor]) -> None:
        """CPU: what an op reads and nobody made under our eyes counts from here on, and may press."""
        found = [tensor for tensor in tensors if self._ledger_add(tensor)]
        if not found:
            return
        if self.recorder is not None:
            for tensor in found:
                self.recorder.discovered(tensor)
        self._press()

    def _count(self, result: Any) -> None:
        """CPU: the results of an op. More of them than was foreseen press, too."""
        for tensor in tensors_in((result,), {}):
            self._ledger_add(tensor)
        if self.device.allocated_bytes() > self.ladder.budget_bytes:
            self._press()

    def _press(self) -> None:
        with contextlib.suppress(HostBudgetTooSmall, SpillError):  # whoever asks for more memory will be told
            self.ladder.fit(0)

    def _ledger_add(self, tensor: torch.Tensor) -> bool:
        """Whether the ledger had not known the storage."""
        device = self.device
        if not isinstance(device, CpuDevice) or tensor.device.type != "cpu":
            return False
        return device.ledger.add(tensor.untyped_storage())

    # -- saved tensors -----------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> Kept | Saved:
        """What autograd keeps instead of ``tensor``."""
        if self.guard.looks_away:
            self.guard.look_again()  # a step of the optimizer was given up
        if type(tensor) not in _OWN_DISPATCH_FREE:
            return Kept(tensor.detach())  # whose detach may be its own, and must see its own dispatch
        with private.unwatched():
            if self.dead:
                return Kept(tensor.detach())
            if not self._movable(tensor):
                self._note_kept(tensor)
                return Kept(tensor.detach())
            storage = tensor.untyped_storage()
            slot = find(storage, self)
            if slot is None:
                slot = self._new_slot(tensor, storage)
            elif not slot.saved:
                self._enroll(slot, tensor)
            return Saved(slot, tensor, memoryless_alias(tensor, self._hollow(tensor.dtype)))

    def unpack(self, saved: Kept | Saved) -> torch.Tensor:
        """The tensor again, after the check that plain PyTorch would have made."""
        saved.check()
        if isinstance(saved, Kept):
            return saved.tensor
        with private.unwatched():
            if not self.dead:
                self._note_use(saved.slot)
            return saved.rebuild()

    def _movable(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is plain bytes in a storage on our device that nobody fixed there."""
        if tensor.device != self.device.torch_device or not is_plain(tensor):
            return False
        if tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            return False
        storage = tensor.untyped_storage()
        size_bytes = storage.nbytes()
        if size_bytes < _LEAST_BYTES or not storage.resizable():
            return False
        if isinstance(tensor._base, torch.nn.Parameter) or self.kinds(storage) is not None:
            return False
        if tensor._is_zerotensor() or private.functorch_interpreter() is not None:
            return False
        # A copy is aligned like any new tensor, and CPU kernels may change bits with alignment.
        return self.device.is_cuda or storage.data_ptr() % _CPU_ALIGNMENT == 0

    def _new_slot(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> Slot:
        if self._begins_microstep():
            self._begin_microstep(tensor)
        whole = _whole(storage)
        self._ledger_add(whole)
        slot = Slot(self, whole)
        self._enroll(slot, tensor)
        return slot

    def _enroll(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Autograd has saved ``tensor``, of a slot that no saved tensor had until now."""
        slot.saved = True
        slot.ordinal = self._ordinal
        self._live[id(slot)] = self._by_ordinal[self._ordinal] = weakref.ref(slot)
        self._ordinal += 1
        if self.provenance is not None:
            self.provenance.saved(tensor, slot)
        if self.recorder is not None:
            self.recorder.saved(slot)
        if self.follower is not None:
            self._check_against(self.follower.program, slot)

    def _note_kept(self, tensor: torch.Tensor) -> None:
        """Between two micro-steps: what is saved before the first tensor that could move."""
        if self._ordinal == 0 or (self._backward_seen and not private.in_backward()):
            self._met = (*self._met, tuple(tensor.shape))[:_MOST_MET]

    def _check_against(self, program: Program, slot: Slot) -> None:
        expected = program.expected.get(slot.ordinal)
        if expected is None and slot.ordinal < program.saves:
            return
        if expected is not None and _rounded(expected.size_bytes) == _rounded(slot.size_bytes):
            self._clock = expected.saved_at
            return
        self._strayed = True
        self.follower = None
        self._look_ahead()

    def _hold(self, tensor: torch.Tensor) -> Slot | None:
        """A slot that no saved tensor has: recipes hold it. It stays where it is."""
        if not self._movable(tensor) or find(tensor.untyped_storage(), self) is not None:
            return None
        return Slot(self, _whole(tensor.untyped_storage()))

    def _value_to_hold(self, tensor: torch.Tensor) -> int:
        """The tape's id of what could be held, -1 for what could not."""
        return self.recorder.value_of(tensor) if self.recorder is not None and self._movable(tensor) else -1

    def _note_use(self, slot: Slot) -> None:
        if not self._backward_seen:
            self._begin_backward()
        if self.recorder is not None:
            if self.recorder.phase is not Phase.BACKWARD and private.in_backward():
                self.recorder.phase = Phase.BACKWARD
                private.at_end_of_backward(self._backward_ended)
            self.recorder.needed(slot)
        elif self.follower is not None and slot.first_use:
            self._note_first_use(self.follower, slot)
        slot.first_use = False

    def _begin_backward(self) -> None:
        self._backward_seen = True
        if self.provenance is not None:
            self.provenance.release()
        if self._lap is not None and private.in_backward():
            private.at_end_of_backward(self._lap.end)
        if self.empty_before_backward:
            self.ladder.reclaim(EVERYTHING_BYTES)

    def _note_first_use(self, follower: Follower, slot: Slot) -> None:
        expected = follower.program.expected.get(slot.ordinal)
        if expected is None:
            return
        self._clock = max(self._clock, expected.needed_at)
        if self._clock >= follower.due:
            follower.catch_up(self._clock)
            self._look_ahead()
        if slot.where is Where.AWAY:
            self.late_fetches += 1

    def _prove(self, slot: Slot, recipe: Recipe) -> bool | None:
        """Whether ``recipe`` gives the bytes that ``slot`` has now; None if that could not be found out.

        What it is made from and was gone comes back for it, and goes again.
        """
        gone = [
            (other, other.recipe) for other in self.living() if other.where in (Where.DROPPED, Where.AWAY)
        ]
        self._proving = True
        try:
            again = self.replay(recipe)
            return self._same_bytes(slot.take(), again)
        except (LMSError, torch.OutOfMemoryError) as error:
            log.debug("a recipe could not be tried: %s", error)
            return None
        finally:
            for other, its_recipe in gone:
                if other.where is Where.HELD and other.alone():
                    self._let_go(other, its_recipe)

    def _let_go(self, slot: Slot, recipe: Recipe | None) -> None:
        if recipe is not None:
            slot.drop(recipe)
        else:
            slot.send(self.store.place(slot.size_bytes))
            slot.release()

    def _same_bytes(self, left: torch.UntypedStorage, right: torch.UntypedStorage) -> bool:
        """Compared piece by piece, which takes next to no memory."""
        if left.nbytes() != right.nbytes():
            return False
        if self.device.is_cuda:
            self.ladder.reserve((_COMPARED_BYTES,))
        pieces = zip(_whole(left).split(_COMPARED_BYTES), _whole(right).split(_COMPARED_BYTES), strict=True)
        return all(bool(torch.equal(one, other)) for one, other in pieces)

    def _may_look_away(self) -> bool:
        """Whether the optimizer's step may run unseen: no recipe reads what it writes, and by the tape it
        has so much room that it cannot run out."""
        follower = self.follower
        known = self.device.is_cuda and follower is not None and self._backward_seen
        if not known or self._dropped or follower is None:
            return False
        self.guard.timer = self.timer
        return follower.program.roomy_at_end

    def _backward_ended(self) -> None:
        if self.recorder is not None:
            self.recorder.phase = Phase.BETWEEN
            self.recorder.module = ""

    def _hollow(self, dtype: torch.dtype) -> torch.Tensor:
        hollow = self._hollows.get(dtype)
        if hollow is None:
            hollow = torch.empty(0, dtype=dtype, device=self.device.torch_device)
            self._hollows[dtype] = hollow
        return hollow

    # -- micro-steps -------------------------------------------------------------------------

    def _begins_microstep(self) -> bool:
        if self._ordinal == 0:
            return True
        if private.in_backward():
            return False  # saved by a backward pass that is itself differentiable
        return self.routine is None or self._backward_seen or not self._live

    def _begin_microstep(self, first: torch.Tensor) -> None:
        self.end_microstep()
        for slot in self.living():  # of a graph that outlives its micro-step: strange to the next tape
            slot.value = slot.ordinal = -1
        program: Program | None = None
        self._ordinal = self._clock = 0
        self._by_ordinal = {}
        self._backward_seen = self._strayed = False
        signature = Signature(tuple(first.shape), first.dtype, self.module_here(), self._met)
        self._met = ()
        routine = self._routine_of(signature)
        self.prepare(self, routine)
        self.steps += 1
        self.guard.outside()
        self.routine = routine
        self._began_s = time.perf_counter()
        self.provenance = self._new_provenance(routine)
        if routine.verdict is Verdict.RECORD:
            self.begin_recording(self.steps)
            self.recorder = Recorder(self.device, self.kinds, self.provenance)
            if self.provenance is not None:
                self.provenance.value_of = self._value_to_hold
            self.recorder.module = self.module_here()
        elif routine.verdict is Verdict.FOLLOW:
            program = routine.program
            if len(routine.timings) < TIMINGS:
                self.timer = OpTimer(self.device)
        self._lap = Lap(self.device) if self.recompute and program is not None else None
        self.holes.begin_step(program)
        watching = self.recorder is not None or self.timer is not None or self.holes.learning
        self._plainly = self.device.is_cuda and not watching
        self.rooms.begin_step()
        if self.verifier is not None:
            self.verifier.begin_step(self.steps)
        self._ooms = self._allocator_ooms() - self.ladder.ooms
        if program is not None:
            self.follower = Follower(
                program, self._by_ordinal, self.store, self.holes, self.provenance, self._prove
            )
        self._look_ahead()

    def _new_provenance(self, routine: Routine) -> Provenance | None:
        """Provenance is kept while recording, and where the program drops something."""
        drops = routine.program is not None and routine.program.drops
        recording = routine.verdict is Verdict.RECORD
        if not self.recompute or not (recording or (drops and routine.verdict is Verdict.FOLLOW)):
            return None
        return Provenance(
            self.steps,
            device=self.device.torch_device,
            kinds=self.kinds,
            hold=self._hold,
            hollow=self._hollow,
        )

    def settle(self) -> None:
        """Between two forward passes: plan what is ready, without waiting for the next saved tensor."""
        if self.routine is None or not self._backward_seen or private.in_backward():
            return
        routine = self.routine
        self.end_microstep()
        self.prepare(self, routine)

    def restart_measuring(self) -> None:
        """Peaks and counters from here on are those of planned steps."""
        if self.device.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device.torch_device)
        elif isinstance(self.device, CpuDevice):
            self.device.ledger.reset_peak()
        self.step_times_s.clear()
        self.counted_from = (self.steps, self.store.bytes_out, self.store.bytes_in, self.store.disk_bytes)

    def _routine_of(self, signature: Signature) -> Routine:
        """The routine of ``signature``, new if need be; the ones met longest ago are forgotten."""
        routine = self.routines.pop(signature, None) or Routine(signature)
        self.routines[signature] = routine
        if len(self.routines) > _MOST_ROUTINES:
            del self.routines[next(iter(self.routines))]
        return routine

    def end_microstep(self, *, closing: bool = False) -> None:
        """Close the micro-step that ran until now: keep its tape, or how well it kept to the plan."""
        routine, self.routine = self.routine, None
        recorder, self.recorder = self.recorder, None
        self.provenance = None
        followed, self.follower = self.follower, None
        timer, self.timer = self.timer, None
        self._plainly = False
        self._look_ahead()
        self.holes.end_step()
        if routine is None:
            return
        # Failed allocations that raised nowhere: a library swallowed them and took another way.
        starved = max(0, self._allocator_ooms() - self.ladder.ooms - self._ooms)
        if starved:
            self.rooms.starved += starved
            log.warning(
                "%d allocations failed inside a library that then took another way, perhaps a slower one: "
                "the budget leaves no room for the workspace of some convolution",
                starved,
            )
        if recorder is not None:
            # A backward pass that raised never ended: its tape is half a step, and the next one is recorded.
            if self._backward_seen and recorder.phase is not Phase.BACKWARD:
                recorder.reclassify(self.late_kinds())
                routine.recorded(recorder.finish())
            recorder.closed = True
            self.store.close_empty_slabs()
        elif self._strayed:
            if self._backward_seen and not closing:
                routine.stray()
        elif followed is not None:
            routine.followed(self._lap)
            if self._proving:
                self.restart_measuring()
                self._proving = False
            if timer is not None:
                routine.timings.append(timer.times())
            self.step_times_s.append(time.perf_counter() - self._began_s)

    def _allocator_ooms(self) -> int:
        if not self.device.is_cuda:
            return 0
        return int(private.allocator_stats(self.device.torch_device)["num_ooms"])

    # -- SlotOwner ---------------------------------------------------------------------------

    def allocate(self, size_bytes: int) -> torch.Tensor:
        if self.dead:  # at the end everything comes home, and the budget is no longer promised
            return torch.empty(size_bytes, dtype=torch.uint8, device=self.device.torch_device)
        target = self.ladder.allocate(size_bytes)
        self._ledger_add(target)
        return target

    def start_out(self, source: torch.Tensor, place: Place) -> Copy:
        return self.store.copy_out(source, place)

    def start_in(self, place: Place, target: torch.Tensor, after: Copy | None) -> Copy:
        return self.store.copy_in(place, target, after)

    def adopt(self, orphan: Orphan) -> None:
        if self.dead:
            orphan.bury()  # closed: all copies have ended, and nobody comes by any more
        else:
            self.orphans.append(orphan)

    def _bury(self) -> None:
        """Let go of what finalizers left: here, on the program's own thread and stream, we may wait."""
        while self.orphans:
            self.orphans.popleft().bury()

    def replay(self, recipe: Recipe) -> torch.UntypedStorage:
        return replay(recipe, self._run_again)

    def leaving(self, slot: Slot) -> None:
        if self.recorder is not None:
            self.recorder.leaving(slot)
        if self.verifier is not None and self.verifier.on:
            self.verifier.leaving(slot, self._clock)

    def back(self, slot: Slot) -> None:
        self.comings += 1
        if self.verifier is not None:
            self.verifier.back(slot, self._clock, self._name_of)

    def _name_of(self, slot: Slot) -> str:
        """What the tape says of a slot, in words."""
        tape = self.follower.program.tape if self.follower is not None else None
        for value in tape.values if tape is not None and slot.ordinal >= 0 else ():
            if value.saved == slot.ordinal:
                module = f" in {value.module}" if value.module else ""
                return f"saved value {slot.ordinal}, made by {value.op or value.kind.value}{module},"
        return f"saved value {slot.ordinal}"

    def moved(self, slot: Slot) -> None:
        if slot.where is Where.DROPPED:
            self._dropped.add(id(slot))
        else:
            self._dropped.discard(id(slot))
        if self.recorder is not None:
            self.recorder.moved(slot)

    def forget(self, slot: Slot) -> None:
        self._live.pop(id(slot), None)
        self._dropped.discard(id(slot))
        if self.recorder is not None:
            self.recorder.forgotten(slot)

    def living(self) -> Iterator[Slot]:
        for reference in list(self._live.values()):
            slot = reference()
            if slot is not None:
                yield slot

    # -- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Bring home what is still away, so that graphs that outlive us stay whole; idempotent."""
        if self.dead:
            return
        try:
            self.end_microstep(closing=True)
        finally:
            self.dead = True
            self._look_ahead()
            failures = list(filter(None, map(_bring_home, self.living())))
            self._bury()
        if failures:
            raise failures[0]

    def everything_fits(self) -> bool:
        """Whether every routine met so far needs nothing moved."""
        known = [routine for routine in self.routines.values() if routine.recordings]
        return bool(known) and all(routine.verdict is Verdict.FITS for routine in known)

    def leave_alone(self) -> None:
        """The program is going to run without us."""
        self.end_microstep()
        self._ooms_aside = self._allocator_ooms()

    def failed_alone(self) -> bool:
        """Whether an allocation has failed since ``leave_alone``: it did not fit after all."""
        self.starved_aside = self._allocator_ooms() > self._ooms_aside
        return self.starved_aside

    def outgrown(self) -> bool:
        """Whether what fitted may fit no more, because more memory is in use before a step than was."""
        rise_bytes = max((routine.rise_bytes for routine in self.routines.values()), default=0)
        if not self.device.is_cuda:
            return False
        in_use = private.allocator_stats(self.device.torch_device)["allocated_bytes"]["all"]["current"]
        return int(in_use) + rise_bytes > _FITTING_SHARE * self.ladder.budget_bytes

    def doubt(self) -> None:
        """Record every routine again."""
        for routine in self.routines.values():
            routine.doubt()

    def shrink_to(self, budget_bytes: int) -> None:
        """Have another budget, and keep to it from now on. BudgetTooSmall if what cannot leave needs more."""
        with private.unwatched():
            over_bytes = self.device.allocated_bytes() - budget_bytes
            if over_bytes > 0:
                self.ladder.reclaim(over_bytes)
        self.device.cap(budget_bytes)
        self.ladder.budget_bytes = budget_bytes

    def inactive_bytes(self) -> int:
        """On the device, and could leave it at once."""
        return sum(slot.size_bytes for slot in self.living() if slot.alone())

    def reclaim(self) -> int:
        """Have everything leave that can; returns the bytes freed."""
        with private.unwatched():
            return self.ladder.reclaim(EVERYTHING_BYTES)

    def plan_again(self) -> None:
        """Have every routine planned anew when it comes next, from the tape that it has."""
        for routine in self.routines.values():
            routine.reconsider()

    def improvises(self) -> bool:
        """Whether the routine met last runs without a plan, for it has none."""
        last = next(reversed(self.routines.values()), None)
        return last is not None and last.verdict is Verdict.IMPROVISE

    def plans(self) -> list[Plan]:
        return [program.plan for program in self.programs()]

    def programs(self) -> list[Program]:
        return [routine.program for routine in self.routines.values() if routine.program is not None]

    def last_tape(self) -> Tape | None:
        for routine in reversed(self.routines.values()):
            if routine.tape is not None:
                return routine.tape
        return None


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _drop_in_child() -> None:
    """A forked worker inherits the mode but none of the device's work: it must pass everything by."""
    for engine in list(_ENGINES):
        engine.dead = True


os.register_at_fork(after_in_child=_drop_in_child)


def _bring_home(slot: Slot) -> Exception | None:
    """Have the slot's bytes on the device for good; the error that this led to."""
    try:
        slot.take()
        slot.stay()
    except Exception as error:  # the others are still to be brought home
        return error
    return None


def _whole(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of ``storage``."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))  # type: ignore[call-overload]


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // 512)
