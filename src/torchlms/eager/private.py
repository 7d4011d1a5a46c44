"""Everything this package relies on in torch that torch does not promise, in one place.

Each function says what it assumes and degrades to something safe where torch lacks it; the tests
next to this file fail when an assumption stops holding (torch 2.11 to 2.15).
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch

from torchlms.core.headroom import SMALLEST_PAGE_BYTES
from torchlms.memory.compaction import Block

_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def others_hold(storage: torch.UntypedStorage, ours: int) -> bool:
    """Whether anybody beyond ``ours`` tensors and the Python wrapper keeps ``storage`` alive.

    Assumes that ``torch._C._storage_Use_Count`` counts tensors and the Python wrapper, one each.
    Without it the answer is yes: nothing then leaves, which is safe.
    """
    return _use_count is None or int(_use_count(storage._cdata)) > ours + 1


def storage_object_held(tensor: torch.Tensor) -> bool:
    """Whether somebody keeps the Python object of the tensor's storage, which ``others_hold`` cannot see.

    Assumes that torch gives out one and the same object for a storage as long as that is referred to.
    """
    return sys.getrefcount(tensor.untyped_storage()) > _references_of_nobody()


@functools.cache
def _references_of_nobody() -> int:
    tensor = torch.empty(1)
    return sys.getrefcount(tensor.untyped_storage())


_graph_task: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)


def graph_task() -> int:
    """Which backward pass this thread runs a node of just now, of all passes of the process; -1 for none."""
    return int(_graph_task()) if _graph_task is not None else -1


def in_backward() -> bool:
    """Whether this thread runs a node of a backward pass just now."""
    return graph_task() != -1


def nodes_made() -> int:
    """How many nodes of autograd graphs this thread has made so far; 0 where torch does not tell."""
    count = getattr(torch._C._autograd, "_get_sequence_nr", None)
    return int(count()) if count is not None else 0


def node_number(node: Any) -> int:
    """Which node of its thread this is, in the order in which they were made."""
    number = getattr(node, "_sequence_nr", None)
    return int(number()) if number is not None else -1


def compiled_autograd() -> bool:
    """Whether backward passes are compiled now, and not run by autograd's own threads."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "compiled_autograd_enabled", False))


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the running backward pass ends; only from inside one.

    Not called when that pass raises, so nothing may depend on it for correctness.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def _nothing() -> None:
    return None


# Not None inside a ``torch.func`` transform, whose wrapped tensors have no storage of their own.
functorch_interpreter: Callable[[], Any] = getattr(torch._C._functorch, "peek_interpreter_stack", _nothing)


def outside_vmap() -> contextlib.AbstractContextManager[None]:
    """A context in which the vmap by which autograd batches gradients is not on, which refuses random ops.
    Nothing where torch lacks the way out."""
    enter = getattr(torch._C, "_vmapmode_increment_nesting", _nothing)
    leave = getattr(torch._C, "_vmapmode_decrement_nesting", _nothing)
    levels = (enter() or 1) - 1  # the one way to learn how many are on
    leave()
    return _left(levels, enter, leave) if levels else contextlib.nullcontext()


@contextlib.contextmanager
def _left(levels: int, enter: Callable[[], Any], leave: Callable[[], Any]) -> Iterator[None]:
    for _ in range(levels):
        leave()
    try:
        yield
    finally:
        for _ in range(levels):
            enter()


def allocator_stats(device: torch.device) -> dict[str, Any]:
    """The caching allocator's nested counters: 15 microseconds, a tenth of the public flat form."""
    raw = getattr(torch._C, "_cuda_memoryStats", None)
    if raw is None:
        return _nest(torch.cuda.memory_stats(device))
    stats: dict[str, Any] = raw(device.index or 0)
    return stats


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split(".")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return nested


def allocator_ooms(device: torch.device, *, here: bool = False) -> int:
    """How many allocations have failed, in any thread or ``here`` in this one, with those that a library has
    hidden. Only differences count.

    Assumes that the allocator calls an observer for each, in its thread, which costs nothing otherwise; where
    it takes none its own counter is read, which is of all threads. An observer stays for the life of the
    process.
    """
    if not _listens_to_ooms():
        return int(allocator_stats(device)["num_ooms"])
    return _OOMS[device.index or 0, threading.get_ident() if here else _ANY_THREAD]


_OOMS: Counter[tuple[int, int]] = Counter()  # by the device's index and the thread
_ANY_THREAD = -1
_LISTENING = threading.RLock()  # a finalizer that closes an LMS may come in anywhere, and asks again


def _listens_to_ooms() -> bool:
    with _LISTENING:  # two threads would attach two observers, and each failure would count twice
        return _attached_observer()


@functools.cache
def _attached_observer() -> bool:
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None:
        return False
    try:
        attach(_note_oom)
    except RuntimeError:  # an allocator that is not torch's own
        return False
    return True


def _note_oom(device_index: int, *_: int) -> None:
    _OOMS[device_index, _ANY_THREAD] += 1
    _OOMS[device_index, threading.get_ident()] += 1


def allocator_remaps(device: torch.device) -> int:
    """How often the caching allocator found no block and gave its free memory back to try again."""
    return int(allocator_stats(device)["num_alloc_retries"])


def mapped_runs(device: torch.device) -> list[list[Block]]:
    """The blocks of the current stream's large pool, by address, in runs without a gap.

    Assumes that a snapshot lists each run of mapped pages as a segment of its own, and that expandable
    segments have no end. Takes a millisecond or two.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    segments = [
        segment
        for segment in torch.cuda.memory_snapshot()
        if segment["segment_type"] == "large"
        and segment["stream"] == stream
        and segment["device"] == (device.index or 0)
    ]
    segments.sort(key=lambda segment: segment["address"])
    runs, beyond = [], _ENDLESS
    for segment in reversed(segments):
        end = segment["address"] + segment["total_size"]
        spare_bytes = beyond - end if segment.get("is_expandable", False) else 0
        runs.append([_mapped_block(block, end, spare_bytes) for block in segment["blocks"]])
        beyond = segment["address"]
    return runs[::-1]


def _mapped_block(block: dict[str, Any], end: int, spare_bytes: int) -> Block:
    address, size_bytes = block["address"], block["size"]
    is_last = address + size_bytes == end
    free = block["state"] == "inactive"
    return Block(address, size_bytes, free, spare_bytes=spare_bytes if is_last else 0)


_ENDLESS = 1 << 62  # an address beyond all others


def keep_busy(device: torch.device, seconds: float) -> None:
    """Have the current stream do nothing for about so long; returns at once."""
    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        with torch.cuda.device(device):
            sleep(int(seconds * _CYCLES_PER_S))


def set_expandable_segments(on: bool, page_bytes: int = 0) -> int:
    """Ask the caching allocator to back new segments by remappable pages, of ``page_bytes`` each unless the
    environment says how large. Returns the size of a page, 0 where the allocator does not listen.

    The allocator reads its settings as a whole, so those of the environment are said again with it.
    Settings that the program made while it ran are not known here, and are lost.
    """
    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or getattr(
        torch.cuda.memory, "_set_allocator_settings", None
    )
    if setter is None:
        return 0
    settings = _allocator_settings()
    given_mib = [item.partition(":")[2] for item in settings if item.startswith(_PAGE_SETTING)]
    if given_mib:
        page_bytes = int(given_mib[-1]) << 20
    pages = [] if given_mib else [f"{_PAGE_SETTING}:{(page_bytes or SMALLEST_PAGE_BYTES) >> 20}"]
    for sized in (pages, []):  # not every allocator has pages of other sizes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(RuntimeError, ValueError):
                setter(",".join((*settings, *sized, f"expandable_segments:{on}")))
                return page_bytes if page_bytes and (sized or given_mib) else SMALLEST_PAGE_BYTES
    return 0


_CYCLES_PER_S = 2e9  # more or less, of a GPU
_PAGE_SETTING = "large_segment_size_mb"


def _allocator_settings() -> list[str]:
    """What the environment asks of the allocator, but for expandable segments."""
    text = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    # Commas stand within brackets, too.
    settings = [item.strip() for item in re.split(r",(?![^\[]*\])", text) if item.strip()]
    return [item for item in settings if not item.startswith("expandable_segments")]


def expandable_segments() -> bool:
    """Whether the caching allocator uses remappable segments now."""
    with contextlib.suppress(Exception):
        settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
        return bool(settings.get("expandable_segments", False))
    return False


Switch = tuple[Callable[[], Any], Callable[[Any], Any]]  # how it stands, and what turns it


@functools.cache
def backend_switches(device_type: str) -> tuple[list[Switch], list[Switch]]:
    """The switches by which a program chooses kernels on such a device, those that this torch has: some that
    take microseconds to read, and some that take next to nothing and change with whatever changes TF32.

    Assumes that the legacy ways to ask for TF32 change what the new ones say. A switch that torch will not
    tell (both ways were mixed) stands at None, and is left alone.
    """
    slow = [_switch(name) for name in ("float32_matmul_precision", "blas_preferred_backend")]
    on_cuda = device_type == "cuda"
    quick = [_switch(name) for name in (_SWITCHES_OF_CUDA if on_cuda else _SWITCHES_OF_CPU)]
    if not on_cuda:
        quick.append((torch.get_num_threads, torch.set_num_threads))
    quick.append((_determinism, _set_determinism))
    quick.append((torch.get_default_dtype, torch.set_default_dtype))
    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    write = getattr(torch._C, "_set_fp32_precision_setter", None)
    if read is not None and write is not None:
        for what in (("cuda" if on_cuda else "mkldnn", "matmul"), ("cuda" if on_cuda else "mkldnn", "conv")):
            quick.append((functools.partial(read, *what), functools.partial(write, *what)))
    return slow, quick


_SWITCHES_OF_CUDA = (
    "cudnn_enabled",
    "cudnn_benchmark",
    "cudnn_deterministic",
    "cublas_allow_fp16_reduced_precision_reduction",
    "cublas_allow_bf16_reduced_precision_reduction",
    "cublas_allow_fp16_accumulation",
)
_SWITCHES_OF_CPU = ("mkldnn_enabled", "mkldnn_deterministic", "nnpack_enabled")


def _determinism() -> tuple[bool, bool]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only


def _set_determinism(setting: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(setting[0], warn_only=setting[1])


def _switch(name: str) -> Switch:
    read, write = (getattr(torch._C, f"_{verb}_{name}", None) for verb in ("get", "set"))
    if read is None or write is None:
        return _nothing, lambda setting: None
    if name != "float32_matmul_precision":  # the one that may refuse
        return read, functools.partial(_turn, write)

    def told() -> Any:
        try:
            return read()
        except RuntimeError:
            return None

    return told, functools.partial(_turn, write)


def _turn(write: Callable[..., Any], setting: Any) -> None:
    if setting is not None:
        write(*setting) if isinstance(setting, tuple) else write(setting)


def module_call() -> CodeType | None:
    """The code that runs around each module's ``forward``, with the module as ``self``; None if it is not
    found, and then modules are known by functions named ``forward`` alone."""
    return getattr(getattr(torch.nn.Module, "_call_impl", None), "__code__", None)


def top_saved_tensor_hooks() -> tuple[Any, Any] | None:
    """The innermost saved-tensor hook pair of this thread, or None if there is none (or no telling)."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return None
    pair: tuple[Any, Any] | None = top(True)
    return pair


def top_dispatch_mode() -> Any:
    """The innermost dispatch mode of this thread, or None."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode()


def sole_dispatch_mode() -> bool:
    """Whether no more than one dispatch mode is on in this thread; False where torch does not tell."""
    count = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return count is not None and count() <= 1


def faking() -> bool:
    """Whether a ``FakeTensorMode`` is on, which torch puts below all other modes: nothing is real then."""
    get_mode = getattr(torch._C, "_get_dispatch_mode", None)
    keys = getattr(torch._C, "_TorchDispatchModeKey", None)
    return get_mode is not None and keys is not None and get_mode(keys.FAKE) is not None


def _mode_bypass() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    guard = getattr(torch._C, "_ExcludeDispatchKeyGuard", None)
    key_set, key = getattr(torch._C, "DispatchKeySet", None), getattr(torch._C, "DispatchKey", None)
    if guard is None or key_set is None or key is None:
        from torch.utils._python_dispatch import _disable_current_modes

        return _disable_current_modes
    keys = key_set(key.Python) | key_set(key.PythonTLSSnapshot)
    return functools.partial(guard, keys)


# A context in which ops of this thread bypass every dispatch mode: for our own small ops in hooks.
unwatched = _mode_bypass()


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """A context in which no dispatch mode is on, for ops of others: what they do may need the dispatch of
    their tensors' own classes, which ``unwatched`` bypasses as well."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def _below() -> Callable[[str], contextlib.AbstractContextManager[Any]]:
    guard = getattr(torch._C, "_ExcludeDispatchKeyGuard", None)
    key_set, key = getattr(torch._C, "DispatchKeySet", None), getattr(torch._C, "DispatchKey", None)
    names = ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA")
    if guard is None or key_set is None or not all(hasattr(key, name) for name in names):
        return _below_slowly
    known = [key_set(getattr(key, name)) for name in names]
    keys = functools.reduce(operator.or_, known)
    return lambda device_type: guard(keys)


@contextlib.contextmanager
def _below_slowly(device_type: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


# A context in which ops of this thread run as below autograd and autocast, where a dispatch mode sees them.
# Whether gradients are wanted is another switch, which only the slow way has to turn off.
below_autograd = _below()


def _frame_callback() -> Callable[[], Any]:
    eval_frame = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    callback: Callable[[], Any] | None = getattr(eval_frame, "get_eval_frame_callback", None)
    return callback if callback is not None else _always


def _always() -> bool:
    return True


# Not None while torch.compile looks at every Python frame of this thread, or if there is no telling.
compile_callback = _frame_callback()


def hide_from_compiler(*functions: Any) -> bool:
    """Have torch.compile pass over ``functions`` and whatever they call, at no cost per call.

    For what torch calls from between the compiled pieces of somebody's program: hooks, modes and
    finalizers. Assumes that a code object can be marked so; False, and nothing done, where it cannot.
    """
    eval_frame = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    mark = getattr(eval_frame, "set_code_exec_strategy", None)
    strategy = getattr(eval_frame, "_FrameExecStrategy", None)
    action = getattr(eval_frame, "_FrameAction", None)
    if mark is None or strategy is None or action is None:
        return False
    for function in functions:
        mark(function.__code__, strategy(action.SKIP, action.SKIP))
    return True


def counts_writes_first(func: Any) -> bool:
    """Whether torch counts what ``func`` writes before it runs, and not after.

    Assumes that an op made by ``torch.library.custom_op`` does, and no other.
    """
    definitions = getattr(sys.modules.get("torch._library.custom_ops"), "OPDEFS", {})
    return getattr(func, "_schema", None) is not None and func._schema.name in definitions


def counted_together(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writes to ``tensor`` are counted by ``other``, in the same storage: not if one was made by
    ``.data``. Torch does not say, so one is counted and taken back."""
    take_back = getattr(torch._C._autograd, "_unsafe_set_version_counter", None)
    if take_back is None or tensor.is_inference() or other.is_inference():
        return tensor._version == other._version
    before, was = other._version, tensor._version
    torch.autograd.graph.increment_version(tensor)
    together = other._version != before
    take_back((tensor,), (was,))
    return together
