"""Frames: a traceback as the script alone would have shown it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torchlms.errors import LMSError
from torchlms.runner.main_module import BEGIN

_OURS = str(Path(__file__).resolve().parent.parent) + "/"
_TORCH_OPS = "torch/_ops.py"  # by way of which we call an op


def without_our_frames(error: BaseException) -> TracebackType | None:
    """The traceback of ``error`` without the frames of this package, which its causes lose, too.

    An error that arose in our own code, and is none that we raise on purpose, keeps them: it is our bug.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        other = pending.pop()
        if other is not None and id(other) not in seen:
            seen.add(id(other))
            other.__traceback__ = _kept(other)
            pending += [other.__cause__, other.__context__]
    return error.__traceback__


def _kept(error: BaseException) -> TracebackType | None:
    frames = []
    item = error.__traceback__
    while item is not None:
        frames.append(item)
        if item.tb_frame.f_code in BEGIN:  # until here, the command line
            frames.clear()
        item = item.tb_next
    if not frames:
        return None
    theirs = [not _is_ours(frame) for frame in frames]
    if not theirs[-1] and not isinstance(error, (LMSError, KeyboardInterrupt)):
        return frames[0]
    kept = None
    for index in reversed(range(len(frames))):
        called_by_us = index > 0 and not theirs[index - 1]
        ours = not theirs[index] or (called_by_us and _file(frames[index]).endswith(_TORCH_OPS))
        if not ours:
            frame = frames[index]
            kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return kept


def _is_ours(frame: TracebackType) -> bool:
    return _file(frame).startswith(_OURS)


def _file(frame: TracebackType) -> str:
    return frame.tb_frame.f_code.co_filename
