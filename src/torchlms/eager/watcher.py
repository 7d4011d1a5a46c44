"""Watcher: runs each op when the plan is ready for it, with room for it, and again if there was none."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from torchlms.core.tape import Phase
from torchlms.eager import private
from torchlms.eager.history import about_to_write
from torchlms.eager.ladder import asked_bytes, starved_engine
from torchlms.eager.slot import Where
from torchlms.eager.tensors import tensors_in
from torchlms.eager.traits import careful_ops, makes_cpu_tensors, name_of, rewind_of, writes_list
from torchlms.eager.workspaces import Workspaces
from torchlms.eager.writes import writes_anything
from torchlms.errors import LMSError, StepTorn

if TYPE_CHECKING:
    from torchlms.eager.engine import Engine
    from torchlms.eager.follower import Follower
    from torchlms.eager.microstep import MicroStep
    from torchlms.eager.provenance import Provenance
    from torchlms.eager.recorder import Recorder


# The allocator waits for the device when it remaps. To ask it after each op would take longer than most ops.
_LEAST_REMAP_S = 2e-4


class Watcher:
    """Every op that the thread runs comes by here.

    Most ops of a program that is followed need nothing: nothing is due before them, nobody asks what they
    read or write. Where that was seen once (``quiet``), the op is only run, with an eye on its running out
    of memory.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._device = engine.device
        self._is_cuda = engine.device.is_cuda
        self._guard = engine.guard
        self._ladder = engine.ladder
        self._rooms = engine.rooms
        self._sizes = engine.sizes
        self._holes = engine.holes
        self._accounts = engine.accounts
        self._careful = careful_ops(engine.rooms)
        self._workspaces = Workspaces(
            engine.rooms, engine.ladder, lambda: engine.hidden_ooms(here=True), self._where
        )

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op: act on the plan, make room, survive running out."""
        engine = self._engine
        now = engine.now
        clock = now.clock
        quiet = clock < now.quiet_until and now.quiet[clock] is func
        # A program that drops nothing heeds no writes, but the graph of another may wait for its backward.
        strange = engine.dropped and now.provenance is None
        if quiet and not (strange or engine.orphans or engine.lent.any or self._guard.inside):
            return self._run_quietly(now, func, args, kwargs)
        if engine.dead:
            return func(*args, **kwargs)
        if not self._guard.inside:
            result = self._watch(func, args, kwargs)
            if engine.held and engine.now.follower is None and not engine.now.backward_seen:
                engine.lent.note_made(result, engine.steps)
            return result
        try:
            return self._watch(func, args, kwargs)
        except (LMSError, torch.OutOfMemoryError) as error:
            failure = error.with_traceback(None)  # its frames hold the op's tensors
        raise self._guard.torn(failure)

    def run_again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One op of a recipe: within the budget like any other, but no part of the program."""
        if self._engine.dead:
            return func(*args, **kwargs)
        began_s = time.perf_counter()
        if self._engine.lent.any:
            self._engine.lent.touch(args, kwargs)
        self._make_room(func, args, kwargs)
        result = self._attempt(func, args, kwargs)
        if self._wants_workspace(func):
            self._workspaces.look_again(func, trying=self._engine.prover.busy)
        self._engine.replays += 1
        self._settle_up(result, began_s)
        return result

    def _run_quietly(self, now: MicroStep, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op that needs no more than an eye on running out of memory."""
        clock = now.clock
        now.clock += 1
        try:
            if not now.learning:
                return func(*args, **kwargs)
            began_s = time.perf_counter()
            result = func(*args, **kwargs)
            self._note_remap(clock, began_s)
            return result
        except torch.OutOfMemoryError as error:
            want_bytes = self._heard(error)
        return self._ladder.retry(func, args, kwargs, self._where, want_bytes)

    # -- what an op means to the plan and to recipes -----------------------------------------

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine = self._engine
        now = engine.now
        if engine.orphans:
            engine.bury()
        now.catch_up()
        writes = writes_anything(func)
        if engine.dropped and writes:
            _make_readers_real(func, args, kwargs)
        if engine.lent.any:  # after whatever else runs ops: those may have what this one reads leave
            engine.lent.touch(args, kwargs)
        if now.timer is not None and not self._is_cuda:
            now.timer.begin()  # no device hides what watching takes
        provenance, follower = now.provenance, now.follower
        if provenance is None or (now.backward_seen and not writes):
            self._note_quiet(now, func, writes=writes)
            return self._run(now, func, args, kwargs)
        if follower is not None and follower.program.leaves_out(now.clock, name_of(func)):
            self._note_quiet(now, func, writes=writes)
            result = self._run(now, func, args, kwargs)
            if writes:
                provenance.written(func, args, kwargs, now.clock)
            return result
        began_s = time.perf_counter()
        call = provenance.before(func, args, kwargs, now.clock, forward=not now.backward_seen)
        if follower is not None:
            self._hold(now, follower, provenance, func, args, kwargs)
        ran_s = time.perf_counter()
        result = self._run(now, func, args, kwargs)
        ended_s = time.perf_counter()
        provenance.after(call, args, kwargs, result)
        if now.lap is not None:
            now.lap.again_s += ran_s - began_s + time.perf_counter() - ended_s
        return result

    def _note_quiet(self, now: MicroStep, func: Any, *, writes: bool) -> None:
        """Here the program runs ``func``, and nobody needs to know: next time it is only run."""
        heeded = self._guard.inside or (writes and now.provenance is not None)
        if now.plainly and now.clock < len(now.quiet) and not heeded and not self._careful(func):
            now.quiet[now.clock] = func

    def _hold(
        self,
        now: MicroStep,
        follower: Follower,
        provenance: Provenance,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Of what ``func`` is about to read, hold what the tape says some recipe needs."""
        wanted = follower.program.holding.get(now.clock)
        if wanted is None:
            return
        op, device = follower.program.tape.ops[now.clock], self._device.torch_device
        tensors = [tensor for tensor in tensors_in(args, kwargs) if tensor.device == device]
        if op.name == name_of(func) and len(op.reads) == len(tensors):
            found = zip(tensors, op.reads, strict=True)
            provenance.hold([tensor for tensor, value in found if value in wanted])

    # -- running -----------------------------------------------------------------------------

    def _run(self, now: MicroStep, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if now.plainly and not self._careful(func):
            return self._run_quietly(now, func, args, kwargs)
        began_s = time.perf_counter()
        measured = self._make_room(func, args, kwargs)
        if now.recorder is not None:
            result = self._run_recorded(now.recorder, func, args, kwargs)
        elif not measured:
            result = self._run_new_convolution(func, args, kwargs)
        elif now.timer is not None and self._is_cuda:
            now.timer.begin()
            result = self._attempt(func, args, kwargs)
            now.timer.end(func)
        else:
            result = self._attempt(func, args, kwargs)
        if self._wants_workspace(func):
            self._workspaces.look(func, args, measured=measured)
        self._settle_up(result, began_s)
        if not self._is_cuda:
            self._sizes.prove(args, kwargs, result)
            if now.timer is not None:
                now.timer.end(func)
        now.clock += 1
        return result

    def _settle_up(self, result: Any, began_s: float) -> None:
        """Count what an op has made; see whether the allocator had to remap for it."""
        if not self._is_cuda:
            self._accounts.count(result)
        elif self._engine.now.learning:
            self._note_remap(self._engine.now.clock, began_s)

    def _note_remap(self, clock: int, began_s: float) -> None:
        if time.perf_counter() - began_s > _LEAST_REMAP_S:
            self._holes.note(clock)

    def _make_room(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Make room for what an op will take. False for a convolution of which that is only guessed."""
        if not self._is_cuda:
            self._make_room_in_ledger(func, args, kwargs)
            return True
        if not self._rooms.concerns(func):
            return True
        return self._workspaces.make_room(func, args, kwargs)

    def _wants_workspace(self, func: Any) -> bool:
        """Whether ``func`` is of those that take another way where memory is short, and say nothing."""
        return self._is_cuda and self._rooms.concerns(func)

    def _make_room_in_ledger(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now, reclaims_before = self._engine.now, self._ladder.reclaims
        self._accounts.discover(tensors_in(args, kwargs), now.recorder)
        if makes_cpu_tensors(args, kwargs):
            self._ladder.enter_in_ledger(func, args, kwargs, self._where)
        if now.timer is not None and self._ladder.reclaims > reclaims_before:
            now.timer.begin()  # what evictions take is not the op's time

    def _run_recorded(
        self, recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        module = self._engine.module_here()
        if module or recorder.phase is not Phase.BACKWARD:
            recorder.module = module
        recorder.before(args, kwargs)
        try:
            result = self._attempt(func, args, kwargs)
        except BaseException:
            recorder.abandon()
            raise
        recorder.after(func, result)
        if self._wants_workspace(func):
            self._rooms.learn(func, args, kwargs, recorder.scratch_bytes)
        return result

    def _run_new_convolution(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A shape first met outside a recording: see what it takes, so that next time it is known."""
        device = self._device.torch_device
        torch.cuda.reset_peak_memory_stats(device)
        before = private.allocator_stats(device)["allocated_bytes"]["all"]["current"]
        result = self._attempt(func, args, kwargs)
        peak = private.allocator_stats(device)["allocated_bytes"]["all"]["peak"]
        fresh_bytes = sum(self._sizes.of(func, args, kwargs))
        self._rooms.learn(func, args, kwargs, max(0, int(peak) - int(before) - fresh_bytes))
        return result

    # -- running out of memory ---------------------------------------------------------------

    def _attempt(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rewind = rewind_of(self._device, func, kwargs)
        try:
            return func(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            want_bytes = self._heard(error)
            if writes_list(func):
                raise self._torn(func, error) from None
        except RuntimeError as error:
            if not (self._rooms.concerns(func) and starved_engine(error)):
                raise
            want_bytes = 0
        now = self._engine.now

        def begin_again() -> None:
            if rewind is not None:
                rewind()
            if now.recorder is not None:
                now.recorder.begin_again()
            if now.timer is not None:
                now.timer.begin()
            if self._wants_workspace(func):
                self._workspaces.begin_again(func)

        # Outside the handler: the exception's frames hold the op's tensors.
        return self._ladder.retry(func, args, kwargs, self._where, want_bytes, begin_again)

    def _heard(self, error: BaseException) -> int:
        self._ladder.ooms += 1
        return asked_bytes(error)

    def _torn(self, func: Any, error: torch.OutOfMemoryError) -> Exception:
        """What to raise when memory ran out inside an op that may have changed some of its list already."""
        if self._guard.inside:
            return error
        return StepTorn(
            f"{func} ran out of memory and may have updated some of its tensors but not others ({error}): "
            "give this step up (zero_grad) and run it again, with a larger budget or with foreach=False",
            restored=False,
        )

    def _where(self) -> str:
        """The module whose op runs now, by the stack, else by what is being recorded, or by the tape."""
        now, module = self._engine.now, self._engine.module_here()
        if module or now.routine is None or now.strayed:
            return module
        if now.recorder is not None:
            return now.recorder.module
        tape = now.follower.program.tape if now.follower is not None else now.routine.tape
        ops = tape.ops if tape is not None else ()
        return ops[min(now.clock, len(ops) - 1)].module if ops else ""


def _make_readers_real(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before ``func`` writes: make again what would later be made from what it overwrites."""
    with about_to_write(func, args, kwargs) as cells:
        for reader in [reader for cell in cells for reader in cell.readers or ()]:
            slot = reader()
            if slot is not None and slot.where is Where.DROPPED:
                slot.take()
