"""Replay: carries a recipe out.

Runs without gradients and with autocast off: what was captured below autograd had no part in either. The
switches of the backends stand for each op as they did when it ran first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchlms.eager.backends import Backends
from torchlms.eager.history import Call, Cell, Ref, results_of
from torchlms.eager.private import below_autograd, outside_vmap
from torchlms.eager.recipe import Recipe
from torchlms.eager.tensors import out_of_inference
from torchlms.eager.traits import takes_generator
from torchlms.errors import LMSError, ReplayFailed

if TYPE_CHECKING:
    from torchlms.eager.slot import Slot

    Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def replay(recipe: Recipe, run: Run) -> torch.Tensor:
    """A tensor in a storage with the same bytes again; ``run`` runs one op.

    Raises ReplayFailed if a source has been written since by somebody whom LMS did not see: torch has counted
    that. Of a write that torch does not count either, nobody knows.
    """
    with _no_gradients(), below_autograd(recipe.device_type), outside_vmap():  # kernels ask for the mode, too
        return _Replay(recipe, run).made()


def _no_gradients() -> contextlib.AbstractContextManager[None]:
    """No gradients, which in most backward passes is how things stand; and no inference mode."""
    if torch.is_inference_mode_enabled():
        return out_of_inference()
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


def _generator_at(generator: torch.Generator, state: torch.Tensor) -> torch.Generator:
    """Another generator, in that state: the program's own may be drawn from in another thread meanwhile."""
    alike = torch.Generator(generator.device)
    alike.set_state(state)
    return alike


@contextlib.contextmanager
def _drawn_again(generator: torch.Generator, state: torch.Tensor) -> Iterator[None]:
    """The generator as a call found it, and afterwards as it is now."""
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)


def _unchanged(ref: Ref, lasting: torch.Tensor, storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """The bytes of a parameter or buffer as they were read, also if it lies elsewhere by now."""
    if ref.cell.version_before(lasting) == ref.version and storage.nbytes() == ref.cell.size_bytes:
        return storage
    raise ReplayFailed(
        f"a parameter or buffer of shape {list(ref.shape)} was changed between forward and backward, unseen "
        f"by LMS (version {lasting._version} and {storage.nbytes()} bytes; when it was read, version "
        f"{ref.version} and {ref.cell.size_bytes} bytes). With recompute=False nothing is made from it"
    )


class _Replay:
    """One evaluation: the calls of a recipe in the order of the program, each once. What they make is there
    until the last of them has read it, and no longer."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        self._recipe = recipe
        self._run_op = run
        self._backends = Backends(recipe.device_type)
        self._stand = self._backends.state()  # which nothing turns while we run
        self._there: dict[int, torch.Tensor] = {}  # what is made and still to be read, by its cell's identity

    def made(self) -> torch.Tensor:
        """Some tensor in what the recipe makes."""
        target = self._recipe.cell
        calls = sorted(self._recipe.calls.values(), key=lambda call: call.serial)
        made_by: dict[int, list[Cell]] = {id(target.history[0]): [target]}
        last: dict[int, int] = {}  # which call reads or writes it last
        for place, call in enumerate(calls):
            for ref in call.refs:
                if ref.lasting is None and id(ref.cell) not in self._recipe.slots:
                    if id(ref.cell) not in last and ref.cell is not target:
                        made_by.setdefault(id(ref.cell.history[0]), []).append(ref.cell)
                    last[id(ref.cell)] = place
        last[id(target)] = len(calls)
        for place, call in enumerate(calls):
            self._carry_out(call, made_by.get(id(call), ()))
            for gone in [cell for cell in self._there if last[cell] <= place]:
                del self._there[gone]
        return self._there[id(target)]

    def _carry_out(self, call: Call, makes: Sequence[Cell]) -> None:
        results = self._call(call)
        for cell in makes:
            result = results[cell.place]
            assert result is not None
            self._there[id(cell)] = result

    def _call(self, call: Call) -> list[torch.Tensor | None]:
        args = tuple([self._item(item) for item in call.args])
        kwargs = {name: self._item(item) for name, item in call.kwargs.items()}
        if call.drawn is None and call.backends == self._stand:
            return results_of(self._run(call.func, args, kwargs))
        drawn: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if call.drawn is not None and takes_generator(call.func):
            kwargs["generator"] = _generator_at(*call.drawn)
        elif call.drawn is not None:
            drawn = _drawn_again(*call.drawn)
        with drawn, self._backends.set_to(call.backends):
            return results_of(self._run(call.func, args, kwargs))

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._run_op(func, args, kwargs)
        except (LMSError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ReplayFailed(f"{func} raised {type(error).__name__} when it ran again: {error}") from error

    def _item(self, item: Any) -> Any:
        if isinstance(item, Ref):
            return self._tensor(item)
        if type(item) in (list, tuple):
            return type(item)(self._item(part) for part in item)
        return item

    def _tensor(self, ref: Ref) -> torch.Tensor:
        if ref.lasting is not None and ref.storage is not None:
            storage = _unchanged(ref, ref.lasting, ref.storage)
        elif id(ref.cell) in self._recipe.slots:
            storage = self._slot(ref).take()
        else:
            storage = self._there[id(ref.cell)].untyped_storage()
        empty = torch.empty(0, dtype=ref.dtype, device=storage.device)
        return empty.set_(storage, ref.offset, ref.shape, ref.strides)  # type: ignore[call-overload]

    def _slot(self, ref: Ref) -> Slot:
        cell = ref.cell
        version = cell.version_before(cell.counter) if cell.counter is not None else ref.version
        if len(cell.history) != ref.writes or version != ref.version:
            raise ReplayFailed(f"a saved tensor of shape {list(ref.shape)} was written after it was read")
        return self._recipe.slots[id(ref.cell)][1]
