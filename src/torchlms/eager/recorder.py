"""Recorder: watches one micro-step and writes its tape."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torchlms.core.tape import Kind, Phase, Stretch, Tape
from torchlms.eager import private
from torchlms.eager.draft import OpDraft, ValueDraft
from torchlms.eager.slot import Slot, Where
from torchlms.eager.tensors import tensors_in
from torchlms.memory.device import CudaDevice

if TYPE_CHECKING:
    from torchlms.eager.provenance import Provenance
    from torchlms.eager.saved import Kept, Saved
    from torchlms.memory.device import CpuDevice, Mark

_MARK = "_torchlms_value"
_BLOCK_BYTES = 512  # the caching allocator's granularity
_LAUNCH_S = 2e-4  # from an op's first mark until its kernel is launched, on a slow host


class _ValueMark:
    """Lives in a storage's Python object and reports its death to the recorder."""

    __slots__ = ("moved", "recorder", "value")

    def __init__(self, recorder: Recorder, value: int) -> None:
        self.recorder = recorder
        self.value = value
        self.moved = False

    def __del__(self) -> None:
        if not self.moved:
            self.recorder.died(self.value)


private.hide_from_compiler(_ValueMark.__del__)


@dataclass(slots=True)
class _Running:
    """What was noted before the op that is running now."""

    begin: Mark
    allocated_bytes: int
    reads: list[int] = field(default_factory=list)


class Recorder:
    """One micro-step: from its first saved tensor to the first saved tensor of the next.

    Costs two device events, two looks at the allocator and some Python per op, so only the first
    steps of a routine are recorded.
    """

    def __init__(
        self,
        device: CudaDevice | CpuDevice,
        kinds: Callable[[torch.UntypedStorage], Kind | None],
        provenance: Provenance | None = None,
    ) -> None:
        self._provenance = provenance
        self.device = device
        self.kinds = kinds
        self.phase = Phase.FORWARD
        self.module = ""
        self.closed = False
        self.scratch_bytes = 0  # of the op that ran last
        self._ops: list[OpDraft] = []
        self._values: list[ValueDraft] = []
        self._waiting: dict[int, weakref.ref[Slot]] = {}  # saved, and still held by others
        # By value, whether what its recipe reads is as it was. What is written before the value is needed
        # would have it made before that write, where memory may be shortest.
        self._unwritten: dict[int, Callable[[], bool]] = {}
        self._saved_in: dict[int, str] = {}  # the module in which autograd saved what it keeps, by identity
        self._running: _Running | None = None
        self._resident_bytes = device.allocated_bytes()

    # -- ops ---------------------------------------------------------------------------------

    def before(self, args: Iterable[Any], kwargs: dict[str, Any]) -> None:
        self._find_idle()
        reads = [self.value_of(tensor) for tensor in self._here(args, kwargs)]
        for value in reads:
            self._touch(self._values[value])
        allocated_bytes = self._measure_from_here()
        self._running = _Running(self._begin(), allocated_bytes, [value for value in reads if value >= 0])

    def begin_again(self) -> None:
        """The op that is running is tried once more, after room was made: neither the time that took nor
        the memory in use before is its own."""
        if self._running is not None:
            self._running.allocated_bytes = self._measure_from_here()
            self._running.begin = self._begin()

    def _begin(self) -> Mark:
        """The op begins here. A device that waits for the program would begin at once, and be timed until
        the program has launched the op: it is kept busy for as long as that takes."""
        if self.device.is_cuda and (not self._ops or self._ops[-1].end.passed()):
            private.keep_busy(self.device.torch_device, _LAUNCH_S)
        return self.device.mark()

    def _measure_from_here(self) -> int:
        """Bytes in use, from which the allocator's peak counts now; 0 on the CPU."""
        if not isinstance(self.device, CudaDevice):
            return 0
        torch.cuda.reset_peak_memory_stats(self.device.torch_device)
        stats = private.allocator_stats(self.device.torch_device)
        return int(stats["allocated_bytes"]["all"]["current"])

    def abandon(self) -> None:
        """The op that was about to be recorded raised: it never happened."""
        self._running = None

    def after(self, func: Any, result: Any) -> None:
        running, self._running = self._running, None
        assert running is not None
        end = self.device.mark()
        index = len(self._ops)
        name = str(func)
        fresh_bytes = 0
        writes = []
        for tensor in self._here((result,), {}):
            storage = tensor.untyped_storage()
            value = self._marked(storage)
            if value is None:
                value = self._new_value(storage, index, name)
                fresh_bytes += self._values[value].size_bytes
            writes.append(value)
        self.scratch_bytes = 0
        if isinstance(self.device, CudaDevice):
            stats = private.allocator_stats(self.device.torch_device)
            peak = stats["allocated_bytes"]["all"]["peak"]
            self.scratch_bytes = max(0, peak - running.allocated_bytes - fresh_bytes)
        self._ops.append(
            OpDraft(
                name,
                self.module,
                self.phase,
                tuple(running.reads),
                tuple(writes),
                self.scratch_bytes,
                running.begin,
                end,
            )
        )

    # -- values ------------------------------------------------------------------------------

    def packed(self, kept: Kept | Saved, module: str) -> None:
        """Autograd keeps ``kept`` for the backward of something in ``module``."""
        self._saved_in[id(kept)] = module

    def unpacked(self, kept: Kept | Saved) -> None:
        """Autograd asks for it: what runs now is that backward."""
        self.module = self._saved_in.get(id(kept), self.module)

    def saved(self, slot: Slot) -> None:
        """Autograd saved a storage for the first time in this micro-step."""
        assert slot.bytes is not None
        storage = slot.bytes.untyped_storage()
        value = self._marked(storage)
        if value is None:
            value = self._adopt(storage)
        slot.value = value
        draft = self._values[value]
        if draft.saved >= 0:
            draft.forget_graph()
        draft.saved, draft.saved_at = slot.ordinal, len(self._ops)
        draft.lendable = draft.birth >= 0 and not slot.indices
        self._waiting[value] = weakref.ref(slot)

    def needed(self, slot: Slot) -> None:
        """Autograd asks for a saved storage: perhaps not for the last time, where a graph is retained."""
        if slot.value < 0:
            return
        draft = self._values[slot.value]
        now, backward = len(self._ops), private.graph_task()
        draft.note_held(now)
        # Between two uses in one backward pass it is not worth going.
        if draft.idle_from is not None and draft.idle_from < now and draft.used_in != backward:
            unwritten = self._unwritten.pop(slot.value, None)
            if unwritten is not None and not unwritten():
                draft.recipe = draft.sources = ()
            draft.idle.append(Stretch(draft.idle_from, now))
        draft.idle_from, draft.used_in = None, backward
        self._waiting[slot.value] = weakref.ref(slot)

    def moved(self, slot: Slot) -> None:
        """A slot's bytes left their storage, or came back in a new one: the same value all along."""
        if slot.value < 0:
            return
        if slot.where is not Where.COMING:
            if slot.emptied is None:
                self._waiting.pop(slot.value, None)
        elif slot.bytes is not None:
            setattr(slot.bytes.untyped_storage(), _MARK, _ValueMark(self, slot.value))

    def leaving(self, slot: Slot) -> None:
        """A slot is about to let its storage go, which is not the value's death."""
        if slot.value < 0 or slot.bytes is None:
            return
        self._find_idle()
        draft = self._values[slot.value]
        if draft.idle_from is None and slot.alone():
            self._idle_now(slot, draft)
        mark = getattr(slot.bytes.untyped_storage(), _MARK, None)
        if mark is not None and mark.recorder is self:
            mark.moved = True

    def died(self, value: int) -> None:
        if not self.closed:
            running = self._running is not None
            self._values[value].death = len(self._ops) - (0 if running else 1)

    def forgotten(self, slot: Slot) -> None:
        """A slot died; if its bytes were away then so did the value."""
        if slot.value >= 0:
            self._waiting.pop(slot.value, None)
            if slot.where is Where.AWAY:
                self.died(slot.value)

    def _find_idle(self) -> None:
        """Note which saved storages nobody else holds any more, before the next op."""
        waiting = [(value, reference()) for value, reference in self._waiting.items()]
        for value, slot in waiting:
            if slot is not None and slot.let_go():
                self._idle_now(slot, self._values[value])
                del self._waiting[value]

    def _touch(self, draft: ValueDraft) -> None:
        """The op that comes next reads or writes a value."""
        draft.note_held(len(self._ops), touched=True)
        draft.touched = len(self._ops)

    def _idle_now(self, slot: Slot, draft: ValueDraft) -> None:
        draft.note_held(len(self._ops))
        draft.idle_from = len(self._ops)
        if draft.idle:
            return
        recipe = self._provenance.recipe(slot) if self._provenance is not None else None
        if recipe is not None:
            draft.recipe = recipe.ops
            draft.sources = recipe.source_values
            self._unwritten[slot.value] = recipe.unwritten_since()

    def _here(self, args: Iterable[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        device = self.device.torch_device
        return [tensor for tensor in tensors_in(args, kwargs) if tensor.device == device]

    def _marked(self, storage: torch.UntypedStorage) -> int | None:
        mark: _ValueMark | None = getattr(storage, _MARK, None)
        return mark.value if mark is not None and mark.recorder is self else None

    def value_of(self, tensor: torch.Tensor) -> int:
        """The id of what lies in the tensor's storage."""
        storage = tensor.untyped_storage()
        value = self._marked(storage)
        return self._adopt(storage) if value is None else value

    def discovered(self, tensor: torch.Tensor) -> None:
        """An op reads a storage that nobody had counted: it was there, but not among the resident bytes."""
        if tensor.device == self.device.torch_device and self._marked(tensor.untyped_storage()) is None:
            self._new_value(tensor.untyped_storage(), -1, "")

    def _adopt(self, storage: torch.UntypedStorage) -> int:
        """A storage that was there before the tape began: until now it counted as resident."""
        value = self._new_value(storage, -1, "")
        self._resident_bytes -= self._values[value].size_bytes
        return value

    def _new_value(self, storage: torch.UntypedStorage, birth: int, op: str) -> int:
        size_bytes = storage.nbytes()
        if self.device.is_cuda:
            size_bytes = -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        kind = self.kinds(storage)
        if kind is None:
            kind = Kind.INPUT if birth < 0 else Kind.ACTIVATION
        value = len(self._values)
        self._values.append(ValueDraft(kind, size_bytes, birth, op, self.module, touched=birth))
        setattr(storage, _MARK, _ValueMark(self, value))
        return value

    # -- the tape ----------------------------------------------------------------------------

    def finish(self, *, model: str = "") -> Tape:
        """The tape of what was seen; the recorder is closed afterwards."""
        self.closed = True
        self._provenance = None
        self._unwritten.clear()
        self.device.synchronize()
        count = len(self._ops)
        last = max((at for at, op in enumerate(self._ops) if op.phase is Phase.BACKWARD), default=0)
        for op in self._ops[:last]:
            if op.phase is Phase.BETWEEN:  # of two backward passes over one graph
                op.phase = Phase.FORWARD
        return Tape(
            ops=tuple(op.finished() for op in self._ops),
            values=tuple(draft.finished(index, count) for index, draft in enumerate(self._values)),
            resident_bytes=max(0, self._resident_bytes),
            device=device_name(self.device.torch_device),
            torch=torch.__version__,
            model=model,
        )

    def reclassify(self, storages: Iterable[tuple[torch.UntypedStorage, Kind]]) -> None:
        """Correct the kind of values that only later turned out to be gradients or states."""
        for storage, kind in storages:
            value = self._marked(storage)
            if value is not None:
                self._values[value].kind = kind


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
