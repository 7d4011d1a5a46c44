"""Verifier: in some steps, whether what comes back is what left, and whether anybody reads what was let go.

[Note: What a check can find]
The sum is taken of the device bytes at the moment they are let go, so a value that was changed after its
copy had begun comes back with another sum. Then the bytes are overwritten: whoever still reads them gets
the canary's bits and not, by luck, the right ones.

[Note: Where a sum is taken]
Values leave because memory is short, so a sum must not need any. On a device it works in what was laid by
for it when the step began; in the first step, when it is not known yet which device that is, and wherever
there was no room for it, the bytes are summed up on the host, which takes longer.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from torchlms.errors import VerifyFailed
from torchlms.memory.limits import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchlms.eager.slot import Slot

FIRST_STEPS = 6  # recorded, timed, and the first under the final plan
CANARY = 0xD5  # as a float of any width a large negative number, and no index into anything
_WORD_BYTES = 8
_CHUNK_WORDS = 1 << 16  # summed up at a time
_ROWS = 1 << 8  # of a chunk: a sum over rows needs no memory between the blocks of a kernel
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 over the golden ratio, as a signed number


@dataclass(slots=True)
class _Note:
    """What was noted of a value when it left."""

    checksum: int
    path: list[str] = field(default_factory=list)


class Verifier:
    """Sums and canaries of the slots that leave in the steps it watches; ``every`` is in steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.on = False
        self.values = 0  # that came back and were found whole
        self.value_bytes = 0
        self._sums: Sums | None = None
        self._device: torch.device | None = None
        self._notes: weakref.WeakKeyDictionary[Slot, _Note] = weakref.WeakKeyDictionary()

    def begin_step(self, step: int) -> None:
        """Steps are counted from 1."""
        self.on = step <= FIRST_STEPS or step % self.every == 0
        self._sums = lay_by(self._device) if self.on and self._device is not None else None

    def leaving(self, slot: Slot, op: int) -> None:
        """The slot is about to let its device bytes go."""
        assert slot.bytes is not None
        note = self._notes.get(slot)
        if note is None:
            note = self._notes[slot] = _Note(self._checksum(slot.bytes))
        where = "to be made again" if slot.place is None else f"for the {slot.place.tier}"
        note.path.append(f"left {where} before op {op}")
        slot.bytes.fill_(CANARY)

    def back(self, slot: Slot, op: int, name: Callable[[Slot], str]) -> None:
        """The slot's bytes are there again. Raises VerifyFailed if they are others."""
        note = self._notes.pop(slot, None)
        if note is None:
            return
        assert slot.bytes is not None
        if self._checksum(slot.bytes) != note.checksum:
            raise VerifyFailed(
                f"{name(slot)} ({format_bytes(slot.size_bytes)}) came back before op {op} with other bytes "
                f"than it left with; its way: {', '.join(note.path)}. The gradients of this step are wrong: "
                "go on from the last checkpoint without LMS, and please report this line"
            )
        self.values += 1
        self.value_bytes += slot.size_bytes

    def _checksum(self, whole: torch.Tensor) -> int:
        self._device = whole.device
        sums = self._sums
        if sums is None or sums.device != whole.device:
            sums = Sums(torch.device("cpu"))
        return sums.checksum(whole)


def lay_by(device: torch.device) -> Sums | None:
    """Sums that need no memory later, None if there is no room for them even now."""
    try:
        return Sums(device)
    except torch.OutOfMemoryError:
        return None


class Sums:
    """Takes sums on ``device``, in 1 MiB that it holds and no more; bytes from elsewhere come in pieces."""

    def __init__(self, device: torch.device) -> None:
        places = torch.arange(_CHUNK_WORDS)
        # The copy to a device is waited for, so that sums may then be taken on any stream.
        self._weights = places.mul_(2).add_(1).mul_(_ODD).to(device)
        self._terms = torch.empty_like(self._weights)
        self._rows = torch.empty(_ROWS, dtype=torch.int64, device=device)
        self._chunk, self._total = torch.empty((2,), dtype=torch.int64, device=device).unbind()
        self.device = self._weights.device

    def checksum(self, whole: torch.Tensor) -> int:
        """A number that changes with any byte of ``whole`` (uint8) and with the order of its words.

        The sum of all words, each times an odd number that belongs to its place, modulo 2**64; what is left
        at the end counts as a word.
        """
        size_bytes = whole.numel()
        words = whole[: size_bytes - size_bytes % _WORD_BYTES].view(torch.int64)
        self._total.zero_()
        for start in range(0, words.numel(), _CHUNK_WORDS):
            self._add(words[start : start + _CHUNK_WORDS].to(self.device), start)
        rest = int.from_bytes(bytes(whole[words.numel() * _WORD_BYTES :].tolist()), "little")
        return (int(self._total) + rest * (2 * words.numel() + 1) * _ODD) % (1 << 64)

    def _add(self, chunk: torch.Tensor, start: int) -> None:
        """Add up the words of ``chunk``, the first of which is number ``start``."""
        count = chunk.numel()
        if count < _CHUNK_WORDS:
            self._terms.zero_()
        terms = self._terms[:count]
        torch.add(self._weights[:count], _wrapped(2 * start * _ODD), out=terms)
        terms.mul_(chunk)
        torch.sum(self._terms.view(_ROWS, -1), 1, out=self._rows)
        torch.sum(self._rows, 0, out=self._chunk)
        self._total.add_(self._chunk)


def _wrapped(number: int) -> int:
    """``number`` modulo 2**64, as a signed word."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
