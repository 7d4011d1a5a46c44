"""Saver: what autograd keeps instead of the tensors it saves, and how it gets them back."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from torchlms.core.tape import Phase
from torchlms.eager import private
from torchlms.eager.ladder import EVERYTHING_BYTES
from torchlms.eager.saved import Kept, Saved, memoryless_alias
from torchlms.eager.slot import Slot, Where, find
from torchlms.eager.tensors import hollow as new_hollow
from torchlms.eager.tensors import is_plain, out_of_inference

if TYPE_CHECKING:
    from torchlms.eager.engine import Engine
    from torchlms.eager.follower import Follower
    from torchlms.eager.program import Program

_OWN_DISPATCH_FREE = (torch.Tensor, torch.nn.Parameter)
_CPU_ALIGNMENT = 64
_LEAST_BYTES = 512  # saved tensors below this never move and are not worth a slot
_MOST_MET = 3


class Saver:
    """The two saved-tensor hooks. What is saved gets a slot, unless its bytes must stay where they are."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._device = engine.device
        self._torch_device = engine.device.torch_device
        self._met: tuple[tuple[int, ...], ...] = ()
        self._hollows: dict[torch.dtype, torch.Tensor] = {}
        self.empty_before_backward = False  # everything that may leaves before the next backward pass

    def pack(self, tensor: torch.Tensor) -> Kept | Saved:
        """What autograd keeps instead of ``tensor``."""
        kept = self._packed(tensor)
        if self._engine.now.recorder is not None:
            self._engine.now.recorder.packed(kept, self._engine.module_here())
        return kept

    def _packed(self, tensor: torch.Tensor) -> Kept | Saved:
        guard = self._engine.guard
        if guard.looks_away:
            guard.look_again()  # a step of the optimizer was given up
        kind = type(tensor)
        if kind is torch.nn.Parameter and tensor.is_leaf:  # half of all: no more is done than is needed
            self._note_kept(tensor)
            return Kept(tensor)
        if kind not in _OWN_DISPATCH_FREE:
            return Kept(tensor.detach())  # whose detach may be its own, and must see its own dispatch
        with private.unwatched():
            if self._engine.dead:
                return Kept(tensor.detach())
            if not self.movable(tensor):
                self._note_kept(tensor)
                # A leaf may be given other data, which plain PyTorch reads; anything else holds its graph.
                kept = Kept(tensor if tensor.is_leaf else tensor.detach())
                if self._opens(tensor) and self._engine.begins_microstep(tensor, stays=True):
                    self._engine.begin_microstep(tensor)
                    self._engine.now.opened_by = weakref.ref(kept)
                return kept
            alias = memoryless_alias(tensor, self.hollow(tensor.dtype))
            return Saved(self._slot_of(tensor, alias), tensor, alias)

    def unpack(self, saved: Kept | Saved) -> torch.Tensor:
        """The tensor again, after the check that plain PyTorch would have made."""
        with out_of_inference():  # what a backward pass reads is no inference tensor
            return self._unpacked(saved)

    def _unpacked(self, saved: Kept | Saved) -> torch.Tensor:
        saved.check()
        if self._engine.now.recorder is not None:
            self._engine.now.recorder.unpacked(saved)
        if isinstance(saved, Kept):
            if not saved.tensor.requires_grad:
                return saved.tensor
            with private.unwatched():
                return saved.tensor.detach()
        with private.unwatched():
            if not self._engine.dead:
                self._note_use(saved.slot)
            return saved.rebuild()

    # -- what gets a slot --------------------------------------------------------------------

    def movable(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is plain bytes in a storage on our device that nobody fixed there."""
        if type(tensor) is torch.nn.Parameter or tensor.device != self._torch_device or not is_plain(tensor):
            return False
        if tensor.requires_grad and tensor.is_leaf:
            return False  # somebody holds it, and may give it other data
        if tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            return False
        storage = tensor.untyped_storage()
        if storage.nbytes() < _LEAST_BYTES or not storage.resizable():
            return False
        base = tensor._base if type(tensor) is torch.Tensor else tensor
        if base is not None and isinstance(base, torch.nn.Parameter):  # which is asked in Python
            return False
        if self._engine.kinds(storage) is not None:
            return False
        if tensor._is_zerotensor() or private.functorch_interpreter() is not None:
            return False
        # A copy is aligned like any new tensor, and CPU kernels may change bits with alignment.
        return self._device.is_cuda or storage.data_ptr() % _CPU_ALIGNMENT == 0

    def _opens(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor``, which stays where it is, may be the first of a step all the same: a batch in
        memory that a worker of a DataLoader shares, or that numpy made. No memory of a GPU is fixed so."""
        if self._device.is_cuda or tensor.device != self._torch_device or not is_plain(tensor):
            return False
        if tensor.requires_grad or private.functorch_interpreter() is not None:
            return False
        storage = tensor.untyped_storage()
        fixed = storage.nbytes() >= _LEAST_BYTES and not storage.resizable()
        return fixed and self._engine.kinds(storage) is None

    def _slot_of(self, tensor: torch.Tensor, alias: torch.Tensor) -> Slot:
        """The slot of ``tensor``'s storage, which a tensor saved earlier may have got already."""
        engine, storage = self._engine, tensor.untyped_storage()
        slot = find(storage, engine)
        if slot is None:
            if engine.begins_microstep(tensor):
                engine.begin_microstep(tensor)
            engine.accounts.add(tensor)
            slot = Slot(engine, tensor)
        if not slot.saved:
            self._enroll(slot, tensor, alias)
        return slot

    def _enroll(self, slot: Slot, tensor: torch.Tensor, alias: torch.Tensor) -> None:
        """Autograd has saved ``tensor``, of a slot that no saved tensor had until now."""
        now = self._engine.now
        slot.saved = True
        slot.ordinal = now.ordinal
        now.by_ordinal[now.ordinal] = weakref.ref(slot)
        now.ordinal += 1
        self._engine.enrolled(slot)
        if now.provenance is not None and self._told_of(slot):
            now.provenance.saved(tensor, slot, alias)
        if now.recorder is not None:
            now.recorder.saved(slot)
        if now.follower is not None:
            self._check_against(now.follower.program, slot)
        if now.lap is not None:
            now.lap.note_use()

    def _told_of(self, slot: Slot) -> bool:
        """Whether a recipe may ask for the slot, or make it: while recording any may, later the tape says."""
        follower = self._engine.now.follower
        return follower is None or slot.ordinal in follower.program.involved

    def _check_against(self, program: Program, slot: Slot) -> None:
        now, expected = self._engine.now, program.expected.get(slot.ordinal)
        if expected is None and slot.ordinal < program.saves:
            return
        if expected is not None and _rounded(expected.size_bytes) == _rounded(slot.size_bytes):
            now.clock = expected.saved_at
        else:
            now.stray()

    def hold(self, tensor: torch.Tensor) -> Slot | None:
        """A slot that no saved tensor has: recipes hold it. It leaves only where memory runs out."""
        if not self.movable(tensor) or find(tensor.untyped_storage(), self._engine) is not None:
            return None
        slot = Slot(self._engine, tensor)
        self._engine.held_for_recipes(slot)
        return slot

    def value_to_hold(self, tensor: torch.Tensor) -> int:
        """The tape's id of what could be held, -1 for what could not."""
        recorder = self._engine.now.recorder
        return recorder.value_of(tensor) if recorder is not None and self.movable(tensor) else -1

    def hollow(self, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of ``dtype`` on our device without any bytes."""
        hollow = self._hollows.get(dtype)
        if hollow is None:
            hollow = self._hollows[dtype] = new_hollow(dtype, self._torch_device)
        return hollow

    # -- what is kept ------------------------------------------------------------------------

    def _note_kept(self, tensor: torch.Tensor) -> None:
        """Between two micro-steps: what is saved before the first tensor that could move."""
        now = self._engine.now
        if (now.routine is None or now.backward_seen) and not private.in_backward():
            self._met = (*self._met, tuple(tensor.shape))[:_MOST_MET]

    def forget_met(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of what was kept since the last micro-step."""
        met, self._met = self._met, ()
        return met

    # -- uses --------------------------------------------------------------------------------

    def _note_use(self, slot: Slot) -> None:
        now = self._engine.now
        backward = private.graph_task()
        if not now.backward_seen or backward != now.backward:
            self._begin_backward(backward)
        if now.recorder is not None:
            if now.recorder.phase is not Phase.BACKWARD and private.in_backward():
                now.recorder.phase = Phase.BACKWARD
                private.at_end_of_backward(self._backward_ended)
            now.recorder.needed(slot)
            return
        if now.follower is not None and slot.used_in != backward:
            self._note_new_use(now.follower, slot)
            if now.lap is not None:
                now.lap.note_use()
        slot.used_at, slot.used_in = now.clock, backward

    def _note_new_use(self, follower: Follower, slot: Slot) -> None:
        """Autograd asks for the slot for the first time in this backward pass."""
        expected = follower.program.expected.get(slot.ordinal)
        if expected is None:
            return
        now = self._engine.now
        now.clock = max(now.clock, expected.needed_after(slot.used_at))
        now.catch_up()
        if slot.where is Where.AWAY:
            self._engine.late_fetches += 1

    def _begin_backward(self, backward: int) -> None:
        """A backward pass asks for its first value; perhaps it is not the first one over this graph."""
        now = self._engine.now
        again, now.backward_seen, now.backward = now.backward_seen, True, backward
        differentiable = private.in_backward() and torch.is_grad_enabled()  # else somebody only looks at it
        now.graph.gone_through(self._engine.guard.steps, goes_on=differentiable)
        if now.lap is not None and private.in_backward():
            private.at_end_of_backward(now.lap.end)
        if again:
            return
        if now.provenance is not None:
            now.provenance.release()
        if self.empty_before_backward:
            self._engine.ladder.reclaim(EVERYTHING_BYTES)

    def _backward_ended(self) -> None:
        recorder = self._engine.now.recorder
        if recorder is not None:
            recorder.phase = Phase.BETWEEN
            recorder.module = ""


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // 512)
