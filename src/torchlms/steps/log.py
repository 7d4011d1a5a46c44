"""Log: one row per step of a training loop, as CSV, as TensorBoard scalars, or only for averages."""

from __future__ import annotations

import csv
import statistics
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from torchlms.api import LMS


class ScalarWriter(Protocol):
    """What is needed of a ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class StepRow:
    """What happened since the row before. Bytes are those that moved, or are in use at the end."""

    step: int
    seconds: float
    reclaims: int
    full_reclaims: int
    reclaimed_bytes: int
    retries: int
    late_fetches: int
    replayed_ops: int
    active_device_bytes: int
    inactive_device_bytes: int
    host_bytes: int


_NAMES = tuple(field.name for field in fields(StepRow))
_COUNTED = ("reclaims", "full_reclaims", "reclaimed_bytes", "retries", "late_fetches", "replayed_ops")
_AT_THE_END = ("active_device_bytes", "inactive_device_bytes", "host_bytes")


class StepLog:
    """Call ``step()`` after each step. On CUDA that waits for the device, so that seconds are true.

    ``path`` gets one CSV row per step, written at once. ``writer`` gets the same as scalars under
    ``torchlms/``. The first ``skip`` steps are left out of ``averages()``: they record and plan.

    >>> with torchlms.LMS(model, budget="16GiB") as lms, StepLog(lms, "steps.csv") as steps:  # doctest: +SKIP
    ...     for batch in loader:
    ...         train_on(batch)
    ...         steps.step()
    """

    def __init__(
        self,
        lms: LMS,
        path: str | Path | None = None,
        *,
        writer: ScalarWriter | None = None,
        skip: int = 5,
    ) -> None:
        if skip < 0:
            raise ValueError(f"skip must be 0 or more, not {skip}")
        self.rows: list[StepRow] = []
        self._lms = lms
        self._writer = writer
        self._skip = skip
        self._file: IO[str] | None = None
        if path is not None:
            self._file = Path(path).open("w", newline="")  # noqa: SIM115  (close() closes it)
            csv.writer(self._file).writerow(_NAMES)
        self._before = self._now()
        self._since_s = time.perf_counter()

    def step(self) -> StepRow:
        """A step has ended; what it took."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now, now_s = self._now(), time.perf_counter()
        row = StepRow(
            step=len(self.rows),
            seconds=now_s - self._since_s,
            **{name: now[name] - self._before[name] for name in _COUNTED},
            **{name: now[name] for name in _AT_THE_END},
        )
        self.rows.append(row)
        self._write(row)
        self._before = now
        self._since_s = time.perf_counter()
        return row

    def averages(self) -> dict[str, float]:
        """Means over the steps after the skipped ones, and the median of their seconds; empty before."""
        rows = self.rows[self._skip :]
        if not rows:
            return {}
        means = {name: statistics.fmean(getattr(row, name) for row in rows) for name in _NAMES[1:]}
        return {"steps": len(rows), "median_seconds": statistics.median(row.seconds for row in rows), **means}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _now(self) -> dict[str, int]:
        found = self._lms.stats()
        return {name: found.get(name, 0) for name in (*_COUNTED, *_AT_THE_END)}

    def _write(self, row: StepRow) -> None:
        if self._file is not None:
            csv.writer(self._file).writerow(getattr(row, name) for name in _NAMES)
            self._file.flush()  # what was measured stays if the program is killed
        if self._writer is not None:
            for name in _NAMES[1:]:
                self._writer.add_scalar(f"torchlms/{name}", getattr(row, name), row.step)
