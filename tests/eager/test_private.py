"""One test for each thing that torchlms relies on and torch does not promise.

If one of these fails under a new torch, look at ``eager/private.py``: the function of that name says what
it assumes, and what would still be safe without it.
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchlms.eager import private
from torchlms.eager.install import WatchMode
from torchlms.eager.saved import memoryless_alias


class Names(TorchDispatchMode):
    """Notes the name of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


# -- the use count of a storage --------------------------------------------------------------


def test_the_use_count_is_there() -> None:
    assert private._use_count is not None


def test_others_hold_a_storage_as_tensors() -> None:
    """One for each tensor, wherever it lives, and one for the Python object of the storage itself."""
    ours = torch.empty(10)
    storage = ours.untyped_storage()
    assert not private.others_hold(storage, ours=1)
    view = ours[2:]
    assert private.others_hold(storage, ours=1)
    assert not private.others_hold(storage, ours=2)
    del view
    same = ours.untyped_storage()
    assert same is storage, "a storage has one Python object as long as it lives"
    assert not private.others_hold(storage, ours=1)
    del same


def test_autograd_holds_a_storage_without_any_python_object() -> None:
    x = torch.ones(10, requires_grad=True)
    y = x.exp()
    ours = torch.empty(0).set_(y.detach().untyped_storage())  # type: ignore[call-overload]
    loss = y.sum()
    del y
    assert private.others_hold(ours.untyped_storage(), ours=1), "the graph's own reference does not count"
    del loss
    assert not private.others_hold(ours.untyped_storage(), ours=1)


def test_numpy_holds_a_storage() -> None:
    ours = torch.empty(10)
    array = ours[:].numpy()
    assert private.others_hold(ours.untyped_storage(), ours=1)
    del array
    assert not private.others_hold(ours.untyped_storage(), ours=1)


def test_a_storages_attributes_live_as_long_as_it_does() -> None:
    """Also while Python itself has no reference to it."""
    x = torch.ones(10, requires_grad=True)
    y = x.exp()
    y.untyped_storage().note = "kept"  # type: ignore[attr-defined]
    loss = y.sum()
    del y
    (saved,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = loss.grad_fn.next_functions[0][0]._saved_result  # type: ignore[union-attr]
    assert kept.untyped_storage().note == "kept"
    del saved


def test_without_the_use_count_nothing_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_use_count", None)
    assert private.others_hold(torch.empty(3).untyped_storage(), ours=1)


# -- backward passes -------------------------------------------------------------------------


def test_in_backward_and_nowhere_else() -> None:
    seen = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(private.in_backward()))
    assert not private.in_backward()
    y.sum().backward()
    assert seen == [True]
    assert not private.in_backward()


def test_in_backward_is_of_this_thread() -> None:
    seen = []

    def look(_: torch.Tensor) -> None:
        thread = threading.Thread(target=lambda: seen.append(private.in_backward()))
        thread.start()
        thread.join()

    x = torch.ones(3, requires_grad=True)
    x.register_hook(look)
    x.sum().backward()
    assert seen == [False]


def test_the_callback_comes_at_the_end_of_the_whole_pass() -> None:
    log: list[str] = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: private.at_end_of_backward(lambda: log.append("end")))
    x.register_hook(lambda _: log.append("leaf"))
    y.sum().backward()
    assert log == ["leaf", "end"]


def test_the_callback_does_not_come_when_the_pass_raises() -> None:
    """Nor at the end of the next one."""
    log: list[str] = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: private.at_end_of_backward(lambda: log.append("end")))

    def fail(_: torch.Tensor) -> None:
        raise ValueError("on purpose")

    handle = x.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        y.sum().backward(retain_graph=True)
    handle.remove()
    assert log == []
    (x * 3).sum().backward()
    assert log == []


def test_without_a_task_id_we_are_never_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_graph_task", None)
    assert not private.in_backward()


# -- modes and hooks -------------------------------------------------------------------------


def test_unwatched_ops_are_seen_by_no_mode() -> None:
    with Names() as outer, Names() as inner:
        a = torch.ones(3)
        with private.unwatched():
            b = a + 1
            c = torch.empty(0).set_(b.untyped_storage())  # type: ignore[call-overload]
        d = b * 2
    assert inner.seen == outer.seen == ["aten.ones.default", "aten.mul.Tensor"]
    assert c.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert d.tolist() == [4, 4, 4]


def test_without_modes_classes_keep_their_own_dispatch() -> None:
    """Which ``unwatched`` takes from them; and the modes are back afterwards, the same ones."""

    class Own(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return torch.zeros(())

    called: list[str] = []
    own = torch.Tensor._make_subclass(Own, torch.ones(3))
    with Names() as outer, Names() as inner:
        with private.without_modes():
            own.sum()
        assert private.top_dispatch_mode() is inner
        torch.ones(1)
    assert called == ["aten.sum.default"]
    assert inner.seen == outer.seen == ["aten.ones.default"]


def test_unwatched_leaves_autograd_on() -> None:
    x = torch.ones(3, requires_grad=True)
    with Names(), private.unwatched():
        y = x * 2
    assert y.requires_grad


def test_the_innermost_hooks() -> None:
    assert private.top_saved_tensor_hooks() is None
    first, second = (lambda item: item), (lambda item: item)
    with torch.autograd.graph.saved_tensors_hooks(first, first):
        assert private.top_saved_tensor_hooks() == (first, first)
        with torch.autograd.graph.saved_tensors_hooks(second, second):
            assert private.top_saved_tensor_hooks() == (second, second)
        assert private.top_saved_tensor_hooks() == (first, first)
    assert private.top_saved_tensor_hooks() is None


def test_the_innermost_mode() -> None:
    assert private.top_dispatch_mode() is None
    with Names() as first:
        assert private.top_dispatch_mode() is first
        with Names() as second:
            assert private.top_dispatch_mode() is second
        assert private.top_dispatch_mode() is first
    assert private.top_dispatch_mode() is None


def test_a_mode_is_active_in_the_backward_pass_it_surrounds() -> None:
    x = torch.ones(3, requires_grad=True)
    loss = x.exp().sum()
    with Names() as names:
        loss.backward()
    assert "aten.mul.Tensor" in names.seen


def test_a_fake_mode_is_below_ours_wherever_it_was_entered() -> None:
    class Look(Names):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.seen.append(f"{func} {private.faking()}")
            return func(*args, **(kwargs or {}))

    with Look() as look, FakeTensorMode():
        torch.ones(3)
    torch.ones(3)
    assert look.seen == ["aten.ones.default True"]
    assert not private.faking()


def test_modes_and_hooks_are_of_this_thread() -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append((private.top_dispatch_mode(), private.top_saved_tensor_hooks()))

    with Names(), torch.autograd.graph.saved_tensors_hooks(lambda item: item, lambda item: item):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [(None, None)]


# -- torch.compile and torch.func ------------------------------------------------------------


class Look(TorchDispatchMode):
    """Notes for every op whether the compiler looks at frames now."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.note(func, args, kwargs or {})

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen.append((str(func), private.compile_callback() is not None))
        return func(*args, **kwargs)


class HiddenLook(Look):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.note(func, args, kwargs or {})


def between_compiled_pieces(look: Look) -> list[str]:
    """Run an op where the compiler looks at every frame; returns what it complained of."""
    from torch._dynamo.decorators import skip

    helper = skip(lambda x: x.sin())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: helper(x * 2) + 1, backend="eager")
    with warnings.catch_warnings(record=True) as warned, look:
        warnings.simplefilter("always")
        compiled(torch.ones(3))
    torch._dynamo.reset()
    assert private.compile_callback() is None
    assert ("aten.add.Tensor", False) in look.seen
    return [str(item.message) for item in warned if "how to trace" in str(item.message)]


def test_the_compilers_callback() -> None:
    """Set where it looks at every frame: it then takes a mode's own code for the program's."""
    look = Look()
    assert between_compiled_pieces(look)
    assert ("aten.sin.default", True) in look.seen


def test_hidden_from_the_compiler() -> None:
    """It passes over what is marked, and over all that is called from there."""
    look = HiddenLook()
    assert private.hide_from_compiler(HiddenLook.__torch_dispatch__)
    assert between_compiled_pieces(look) == []
    assert ("aten.sin.default", False) in look.seen


def test_the_mode_keeps_compiled_regions_compiled() -> None:
    """The declarations that it makes are those that torch asks for."""
    assert WatchMode.ignore_compile_internals()
    assert WatchMode.supports_higher_order_operators
    assert WatchMode._should_skip_dynamo() is False
    assert hasattr(TorchDispatchMode, "_should_skip_dynamo"), "torch asks something else by now"
    assert hasattr(TorchDispatchMode, "ignore_compile_internals")


def test_inside_a_transform() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(private.functorch_interpreter() is not None)
        return x.sum()

    assert private.functorch_interpreter() is None
    torch.func.vmap(function)(torch.ones(2, 3))
    torch.func.grad(function)(torch.ones(3))
    function(torch.ones(3))
    assert seen == [True, True, False]


# -- versions --------------------------------------------------------------------------------


def test_an_alias_without_memory_shares_the_version() -> None:
    tensor, hollow = torch.ones(1000), torch.empty(0)
    alias = memoryless_alias(tensor, hollow)
    assert alias._version == tensor._version
    tensor.add_(1)
    tensor[3:].mul_(2)
    assert alias._version == tensor._version == 2
    assert alias.untyped_storage().nbytes() == 0
    assert not private.others_hold(tensor.untyped_storage(), ours=1)
    assert hollow._version == 0


def test_hooks_are_given_no_version_check_by_torch() -> None:
    """Why we check ourselves. If this fails, torch does it by now."""
    with torch.autograd.graph.saved_tensors_hooks(lambda item: item, lambda item: item):
        y = torch.ones(3, requires_grad=True).exp()
        loss = y.sum()
        y.add_(1)
        loss.backward()


# -- the CUDA allocator ----------------------------------------------------------------------


def test_flat_counters_become_nested() -> None:
    assert private._nest({"num_ooms": 1, "a.b.current": 2, "a.b.peak": 3, "a.c": 4}) == {
        "num_ooms": 1,
        "a": {"b": {"current": 2, "peak": 3}, "c": 4},
    }


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had listened yet. Who does is not forgotten: with a second one all would count twice."""
    fresh = functools.cache(private._attached_observer.__wrapped__)
    monkeypatch.setattr(private, "_attached_observer", fresh)


def test_failed_allocations_are_told_by_an_observer(monkeypatch: pytest.MonkeyPatch, deaf: None) -> None:
    observers: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    device, other = torch.device("cuda", 1), torch.device("cuda", 0)
    before, others_before = private.allocator_ooms(device), private.allocator_ooms(other)
    (observer,) = observers
    observer(1, 1 << 30, 1 << 34, 1 << 20)
    assert private.allocator_ooms(device) == before + 1
    assert private.allocator_ooms(other) == others_before
    assert len(observers) == 1
    here = private.allocator_ooms(device, here=True)
    thread = threading.Thread(target=observer, args=(1, 1 << 30, 1 << 34, 1 << 20))
    thread.start()
    thread.join()
    assert private.allocator_ooms(device) == before + 2
    assert private.allocator_ooms(device, here=True) == here


def test_threads_that_ask_at_once_attach_one_observer(monkeypatch: pytest.MonkeyPatch, deaf: None) -> None:
    observers: list[Any] = []

    def attach(observer: Any) -> None:
        time.sleep(0.02)
        observers.append(observer)

    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", attach, raising=False)
    threads = [
        threading.Thread(target=private.allocator_ooms, args=(torch.device("cuda", 0),)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(observers) == 1


def test_an_allocator_that_takes_no_observer_is_asked(monkeypatch: pytest.MonkeyPatch, deaf: None) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("cudaMallocAsync does not yet support attachOutOfMemoryObserver")

    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", refuse, raising=False)
    monkeypatch.setattr(private, "allocator_stats", lambda device: {"num_ooms": 4})
    assert private.allocator_ooms(torch.device("cuda", 0)) == 4


def test_failed_allocations_are_counted_without_one(monkeypatch: pytest.MonkeyPatch, deaf: None) -> None:
    monkeypatch.delattr(torch._C, "_cuda_attach_out_of_memory_observer", raising=False)
    monkeypatch.setattr(private, "allocator_stats", lambda device: {"num_ooms": 3})
    assert private.allocator_ooms(torch.device("cuda", 0)) == 3


def segment(address: int, sizes: list[int], **facts: Any) -> dict[str, Any]:
    """As a snapshot of the allocator tells of one; a negative size is a free block."""
    blocks, at = [], address
    for size in sizes:
        blocks.append(
            {"address": at, "size": abs(size), "state": "inactive" if size < 0 else "active_allocated"}
        )
        at += abs(size)
    usual = {"segment_type": "large", "stream": 7, "device": 0, "is_expandable": True}
    return {**usual, "address": address, "total_size": at - address, "blocks": blocks, **facts}


def test_a_hole_may_grow_up_to_what_is_mapped_next(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        segment(500, [10, -40]),
        segment(0, [-100, 50, -50]),
        segment(900, [-20], is_expandable=False),
        segment(300, [-10, 30]),
        segment(700, [-5], stream=8),
        segment(600, [-5], segment_type="small"),
        segment(650, [-5], device=1),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    runs = private.mapped_runs(torch.device("cuda", 0))
    told = [
        [(block.address, block.size_bytes, block.free, block.spare_bytes) for block in run] for run in runs
    ]
    assert told == [
        [(0, 100, True, 0), (100, 50, False, 0), (150, 50, True, 100)],
        [(300, 10, True, 0), (310, 30, False, 160)],
        [(500, 10, False, 0), (510, 40, True, 350)],
        [(900, 20, True, 0)],
    ]
    found.pop(2)
    (*_, last), endless = private.mapped_runs(torch.device("cuda", 0))[-1], 1 << 50
    assert last.free
    assert last.spare_bytes > endless


@pytest.mark.gpu
def test_the_observer_hears_of_each() -> None:
    device = torch.device("cuda", 0)
    before = private.allocator_ooms(device)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 50, dtype=torch.uint8, device=device)
    assert private.allocator_ooms(device) == before + 2


@pytest.mark.gpu
def test_the_allocators_counters() -> None:
    device = torch.device("cuda", 0)
    before = private.allocator_stats(device)
    kept = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    after = private.allocator_stats(device)
    grown = after["allocated_bytes"]["all"]["current"] - before["allocated_bytes"]["all"]["current"]
    assert grown == kept.numel()
    assert after["allocated_bytes"]["all"]["current"] == torch.cuda.memory_allocated(device)
    assert after["num_ooms"] == torch.cuda.memory_stats(device)["num_ooms"]


@pytest.mark.gpu
def test_expandable_segments_can_be_switched() -> None:
    before = private.expandable_segments()
    try:
        for on in (True, False):
            assert private.set_expandable_segments(on)
            assert private.expandable_segments() is on
    finally:
        private.set_expandable_segments(before)


@pytest.mark.gpu
def test_pages_have_the_size_that_is_asked_for() -> None:
    before = private.expandable_segments()
    torch.cuda.empty_cache()
    reserved_bytes = torch.cuda.memory_reserved()
    try:
        page_bytes = private.set_expandable_segments(True, 64 << 20)
        # On a stream of its own, so that it cannot be put into a segment that is there.
        with torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.empty(2 << 20, dtype=torch.uint8, device="cuda")
        assert page_bytes == 64 << 20
        assert torch.cuda.memory_reserved() - reserved_bytes == page_bytes
        del tensor
    finally:
        private.set_expandable_segments(before)


@pytest.mark.parametrize(
    ("environment", "refused", "said", "page_mib"),
    [
        ("", "", "large_segment_size_mb:64,expandable_segments:True", 64),
        ("", "large_segment_size_mb", "expandable_segments:True", 20),
        ("large_segment_size_mb:32", "", "large_segment_size_mb:32,expandable_segments:True", 32),
        ("", "expandable", "", 0),
    ],
)
def test_what_the_allocator_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, environment: str, refused: str, said: str, page_mib: int
) -> None:
    heard = []

    def setter(text: str) -> None:
        if refused and refused in text:
            raise ValueError(text)
        heard.append(text)

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", environment)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", setter, raising=False)
    assert private.set_expandable_segments(True, 64 << 20) == page_mib << 20
    assert heard == ([said] if said else [])


def test_the_allocators_other_settings_are_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    text = "max_split_size_mb:64, roundup_power2_divisions:[256:1,512:2],expandable_segments:False"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", text)
    assert private._allocator_settings() == ["max_split_size_mb:64", "roundup_power2_divisions:[256:1,512:2]"]
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    assert private._allocator_settings() == []


# -- below autograd --------------------------------------------------------------------------


@pytest.mark.parametrize("below", [private.below_autograd, private._below_slowly])
def test_below_autograd_and_autocast_ops_are_only_run(below: Any) -> None:
    weights = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ops.aten.mm.default(weights, weights).dtype is torch.bfloat16
        with below("cpu"):
            product = torch.ops.aten.mm.default(weights, weights)
        assert torch.ops.aten.mm.default(weights, weights).requires_grad
    assert product.dtype is torch.float32
    assert not product.requires_grad


def test_there_is_a_quick_way_below_autograd() -> None:
    assert private.below_autograd is not private._below_slowly


def test_whether_two_tensors_count_their_writes_together() -> None:
    ours = torch.ones(4)
    ours.add_(1)
    for other, together in (
        (ours.detach(), True),
        (ours[1:], True),
        (ours.data, False),
        (ours.clone(), False),
    ):
        versions = ours._version, other._version
        assert private.counted_together(other, ours) is together
        assert private.counted_together(ours, other) is together
        assert (ours._version, other._version) == versions
