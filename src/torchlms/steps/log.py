"""Log: one row per step of a training loop, as CSV, as TensorBoard scalars, or only for averages."""

from __future__ import annotations

import csv
import statistics
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import torch


class HasStats(Protocol):
    """What is needed of an ``LMS``."""

    def stats(self) -> dict[str, Any]: ...


class ScalarWriter(Protocol):
    """What is needed of a ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class StepRow:
    """What happened since the row before. Bytes are those that moved, or are in use at the end. ``tags`` are
    the user's own; ``items_per_s`` is 0 where no batch size is known."""

    step: int
    seconds: float
    reclaims: int
    single_reclaims: int
    full_reclaims: int
    reclaimed_bytes: int
    retries: int
    late_fetches: int
    replayed_ops: int
    bytes_out: int
    bytes_in: int
    disk_bytes: int
    active_device_bytes: int
    inactive_device_bytes: int
    host_bytes: int
    items_per_s: float = 0.0
    tags: dict[str, str | int | float] = field(default_factory=dict)


_NAMES = tuple(each.name for each in fields(StepRow) if each.name not in ("items_per_s", "tags"))
_COUNTED = (
    "reclaims",
    "single_reclaims",
    "full_reclaims",
    "reclaimed_bytes",
    "retries",
    "late_fetches",
    "replayed_ops",
    "bytes_out",
    "bytes_in",
    "disk_bytes",
)
_AT_THE_END = ("active_device_bytes", "inactive_device_bytes", "host_bytes")


class StepLog:
    """Call ``step()`` after each step. On CUDA that waits for the device, so that seconds are true.

    ``path`` gets one CSV row per step, written at once. ``writer`` gets the same as scalars under
    ``torchlms/``. The first ``skip`` steps are left out of ``averages()``: they record and plan. With
    ``batch_size`` there is a rate. What ``step`` is given by name, such as ``phase="train"``, is in the row:
    columns of the CSV are the names of the first step.

    >>> with torchlms.LMS(model, budget="16GiB") as lms, StepLog(lms, "steps.csv") as steps:  # doctest: +SKIP
    ...     for batch in loader:
    ...         train_on(batch)
    ...         steps.step()
    """

    def __init__(
        self,
        lms: HasStats,
        path: str | Path | None = None,
        *,
        writer: ScalarWriter | None = None,
        skip: int = 5,
        batch_size: int = 0,
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
        self._batch_size = batch_size
        self._names = (*_NAMES, "items_per_s") if batch_size else _NAMES
        self._before = self._now()
        self._since_s = time.perf_counter()

    def step(self, **tags: str | int | float) -> StepRow:
        """A step has ended; what it took, and the ``tags`` that it is given."""
        if self.rows and tags.keys() != self.rows[0].tags.keys():
            raise ValueError(f"tags {sorted(tags)}: the first step had {sorted(self.rows[0].tags)}")
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now, now_s = self._now(), time.perf_counter()
        row = StepRow(
            step=len(self.rows),
            seconds=now_s - self._since_s,
            items_per_s=self._batch_size / (now_s - self._since_s),
            tags=tags,
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
        means = {name: statistics.fmean(getattr(row, name) for row in rows) for name in self._names[1:]}
        if "items_per_s" in means:  # of all these steps together: a slow one counts for as long as it took
            items = sum(row.items_per_s * row.seconds for row in rows)
            means["items_per_s"] = items / sum(row.seconds for row in rows)
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
            rows = csv.writer(self._file)
            if row.step == 0:
                rows.writerow((*self._names, *row.tags))
            rows.writerow((*(getattr(row, name) for name in self._names), *row.tags.values()))
            self._file.flush()  # what was measured stays if the program is killed
        if self._writer is not None:
            for name in self._names[1:]:
                self._writer.add_scalar(f"torchlms/{name}", getattr(row, name), row.step)
