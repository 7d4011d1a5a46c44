"""Refusals: the one clear error when nothing more can leave, with what is needed, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchlms.eager.tensors import tensors_in
from torchlms.errors import BudgetTooSmall
from torchlms.memory.device import CudaDevice
from torchlms.memory.limits import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchlms.eager.sizes import ResultSizes
    from torchlms.memory.device import CpuDevice

_SCRIPTED = "TorchScript interpreter"
_NEXT_SHARE = 8  # of the budget: by so much more is tried


class Refusals:
    """Words and figures for an op that finds no room on ``device``."""

    def __init__(self, device: CudaDevice | CpuDevice, sizes: ResultSizes) -> None:
        self.whole_step_bytes = 0  # that a plan of such a step needs; 0 where one was made, or none tried
        self._last: tuple[str, int] | None = None  # words and figure of the last one in this step
        self._device = device
        self._sizes = sizes

    def op(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        module: str,
        missing_bytes: int,
        budget_bytes: int,
    ) -> BudgetTooSmall:
        """Op, module, its bytes, what is known to be needed, and a budget to try."""
        operands = _distinct_bytes(tensors_in(args, kwargs))
        results = sum(self._sizes.of(func, args, kwargs))
        inside = f" in {module}" if module else ""
        said = (
            f"{func}{inside} needs {format_bytes(operands)} of operands and {format_bytes(results)} of "
            f"results at once. {self._in_use(budget_bytes)}."
        )
        return self._refusal(said, max(missing_bytes, results), budget_bytes)

    def convolution(
        self, func: Any, module: str, need_bytes: int, budget_bytes: int, *, inside: bool = False
    ) -> BudgetTooSmall:
        """One that would have to do with less than it has been measured to take, or has done so: then an
        allocation failed ``inside``."""
        place = f" in {module}" if module else ""
        failed = "Room for that had been made, and an allocation failed inside all the same"
        said = (
            f"{func}{place} needs {format_bytes(need_bytes)} at once for its results and cuDNN's workspace. "
            f"{failed if inside else self._in_use(budget_bytes)}. With less cuDNN would take another "
            "algorithm, which may give other bits, and deterministic ones were asked for; in this process it "
            "keeps, for shapes that it met while memory was short, what it took then: try again in a new one."
        )
        return self._refusal(said, need_bytes, budget_bytes)

    def way_back(self, size_bytes: int, for_reader: bool, budget_bytes: int) -> BudgetTooSmall:
        """A value that must come back, for an op that reads it or for backward, and finds no room."""
        whom = "an op that reads it" if for_reader else "backward"
        value = f"a saved tensor of {format_bytes(size_bytes)}"
        said = f"{value} must come back for {whom}. {self._in_use(budget_bytes)}."
        return self._refusal(said, size_bytes, budget_bytes)

    def begin_step(self, whole_step_bytes: int) -> None:
        """Another micro-step begins; a plan of such a step is known to need so much, or 0."""
        self.whole_step_bytes = whole_step_bytes
        self._last = None

    def lost_in(self, error: BaseException | None) -> BudgetTooSmall | None:
        """The refusal of this step that ``error`` stands for: TorchScript passes on the words of no error but
        its own, and ``load_state_dict`` only the words."""
        if self._last is None or error is None or isinstance(error, BudgetTooSmall):
            return None
        said, smallest_bytes = self._last
        words = str(error)
        if _SCRIPTED in words or repr(said)[1:-1] in words:
            return BudgetTooSmall(said, smallest_bytes=smallest_bytes)
        return None

    def _made(self, said: str, smallest_bytes: int) -> BudgetTooSmall:
        self._last = (said, smallest_bytes)
        return BudgetTooSmall(said, smallest_bytes=smallest_bytes)

    def _refusal(self, said: str, need_bytes: int, budget_bytes: int) -> BudgetTooSmall:
        so_far_bytes = max(self._device.allocated_bytes() + need_bytes, budget_bytes + 1)
        if so_far_bytes <= self.whole_step_bytes:
            size = _exactly(self.whole_step_bytes)
            advice = (
                f"The smallest budget for a plan of the whole step, as it was recorded, is {size}: raise "
                "budget to that, or use a smaller batch"
            )
            return self._made(f"{said} {advice}", self.whole_step_bytes)
        # Of a step that is not known as a whole always a good deal more than there was, or who follows this
        # would be refused for a few bytes over and over.
        try_bytes = max(so_far_bytes, budget_bytes + budget_bytes // _NEXT_SHARE)
        advice = (
            f"As far as this step got, the smallest budget that works is at least {_exactly(so_far_bytes)}, "
            "and more where more comes later in it, as an optimizer's states do in the first one: try "
            f"{format_bytes(try_bytes, up=True)}, or use a smaller batch. `torchlms plan` says how much a "
            "plan takes, from the tape of a step that had room"
        )
        return self._made(f"{said} {advice}", try_bytes)

    def _in_use(self, budget_bytes: int) -> str:
        """What is left when nothing more can move, and what the allocator holds in unusable pieces."""
        allocated = self._device.allocated_bytes()
        text = (
            f"With everything else moved away {format_bytes(allocated)} are in use of a budget of "
            f"{format_bytes(budget_bytes)}"
        )
        if isinstance(self._device, CudaDevice):
            reserved = int(torch.cuda.memory_reserved(self._device.torch_device))
            text += f", and {format_bytes(reserved - allocated)} lie in holes between tensors"
        return text


def _exactly(size_bytes: int) -> str:
    return f"{format_bytes(size_bytes, up=True)} ({size_bytes} bytes)"


def _distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
