"""Log: one row per step of a training loop, as CSV, as TensorBoard scalars, or only for averages."""

from __future__ import annotations

import csv
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import torch

log = logging.getLogger("torchlms")


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

    ``path`` gets one CSV row per step, written at once; a full disk ends the file, with a warning, and not
    the training. ``writer`` gets the same as scalars under ``torchlms/``. The first ``skip`` steps are
    left out of ``averages()``: they record and plan. With ``batch_size`` there is a rate. What ``step`` is
    given by name, such as ``phase="train"``, is in the row, under that name.

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
        if skip < 0 or batch_size < 0:
            raise ValueError(f"skip and batch_size must be 0 or more, not {skip} and {batch_size}")
        if not hasattr(lms, "stats"):
            raise TypeError(f"lms must be an LMS, not {lms!r}")
        if writer is not None and not hasattr(writer, "add_scalar"):
            raise TypeError(f"writer must have add_scalar, as a SummaryWriter does; {writer!r} has not")
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
        """A step has ended; what it took, and the ``tags`` that it is given: the same names at each step, and
        none that the log itself gives to a figure."""
        if self.rows and tags.keys() != self.rows[0].tags.keys():
            raise ValueError(f"tags {sorted(tags)}: the first step had {sorted(self.rows[0].tags)}")
        if taken := tags.keys() & set(self._names):
            raise ValueError(f"tags {sorted(taken)}: these columns are the log's own")
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

    def averages(self, **tags: str | int | float) -> dict[str, float]:
        """Means over the steps after the skipped ones, and the median of their seconds; empty before. With
        ``tags``, such as ``phase="train"``, over those alone that were given them."""
        rows = [row for row in self.rows[self._skip :] if tags.items() <= row.tags.items()]
        if not rows:
            return {}
        means = {name: statistics.fmean(getattr(row, name) for row in rows) for name in self._names[1:]}
        if "items_per_s" in means:  # of all these steps together: a slow one counts for as long as it took
            items = sum(row.items_per_s * row.seconds for row in rows)
            means["items_per_s"] = items / sum(row.seconds for row in rows)
        return {"steps": len(rows), "median_seconds": statistics.median(row.seconds for row in rows), **means}

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with _or_warn(file):
                file.close()

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
        file = self._file
        if file is not None:
            self._file = None  # unless this row can be written: the next would miss it
            with _or_warn(file):
                self._write_row(file, row)
                self._file = file
        if self._writer is not None:
            for name in self._names[1:]:
                self._writer.add_scalar(f"torchlms/{name}", getattr(row, name), row.step)

    def _write_row(self, file: IO[str], row: StepRow) -> None:
        rows, tags = csv.writer(file), self.rows[0].tags
        if row.step == 0:
            rows.writerow((*self._names, *tags))
        rows.writerow((*(getattr(row, name) for name in self._names), *(row.tags[name] for name in tags)))
        file.flush()  # what was measured stays if the program is killed


@contextmanager
def _or_warn(file: IO[str]) -> Iterator[None]:
    """A log is no reason to lose a training: a full disk is said once, and ``file`` is let go."""
    try:
        yield
    except OSError as error:
        log.warning("%s ends here, training goes on: %s", file.name, error.strerror or error)
        with suppress(OSError):  # what is left in its buffer cannot be written either
            file.close()
