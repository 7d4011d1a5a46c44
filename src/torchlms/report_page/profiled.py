"""Profiled: one step as torch's profiler saw it, read from the trace that ``ProfileWindow`` wrote."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchlms.errors import BadOption

if TYPE_CHECKING:
    from pathlib import Path

_Event = dict[str, Any]

_STEP = re.compile(r"step \d+")
# Categories of the profiler's events. On a device: what ran there, and the calls that began it.
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_CALLS = {"cuda_runtime", "cuda_driver"}
_ON_HOST = {"cpu_op"}
_MEMORY = "cpu_instant_event"
_CUDA = 1  # a type of device, as the profiler numbers them
_DIRECTIONS = {"DtoH": "copies out", "HtoD": "copies in"}


@dataclass(frozen=True, slots=True)
class Happened:
    """One kernel or copy of a device, or one op of a CPU; ``start_s`` counts from the step's first one."""

    name: str
    start_s: float
    seconds: float
    size_bytes: int = 0  # of a copy


@dataclass(frozen=True, slots=True)
class Profiled:
    """The last step of a profile: its name, and what happened on each stream or thread, by the track's.

    ``calls`` are the ops as the program called them, nested ones too, by when they began; ``allocated`` when
    the program had how many bytes. These two are on the program's clock, of which a device may be behind.
    ``absolute``: those bytes count from nothing, and not from the beginning of the profile.
    """

    name: str
    tracks: dict[str, tuple[Happened, ...]]
    calls: tuple[Happened, ...] = ()
    allocated: tuple[tuple[float, int], ...] = ()
    absolute: bool = True

    @staticmethod
    def load(path: Path) -> Profiled:
        """BadOption for a file without marked steps: another profiler's, or no profile."""
        events = _events(path)
        marks = [event for event in events if _marks_step(event)]
        if not marks:
            raise BadOption(
                f"{path} marks no step: it is no trace that ProfileWindow or torchlms run --profile wrote"
            )
        last = marks[-1]
        on_device, calls = _on_device(events, last), _on_host(events, last)
        found = on_device or calls
        if not found:
            raise BadOption(f"{path}: nothing ran in {last['name']}, the last step of the profile")
        notes = [event for event in events if event.get("name") == "[memory]" and _within(event, last)]
        on_cuda = [event for event in notes if event["args"].get("Device Type") == _CUDA]
        if on_cuda or on_device:
            notes = on_cuda
        return Profiled(
            last["name"],
            _tracks(found),
            calls=tuple(_happened(event, float(last["ts"])) for event in calls),
            allocated=tuple(
                ((float(note["ts"]) - float(last["ts"])) * 1e-6, int(note["args"]["Total Allocated"]))
                for note in notes
            ),
            absolute=bool(on_cuda),
        )


def _events(path: Path) -> list[_Event]:
    """What lasted, and the notes on memory, by when each began."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            data = json.load(file)
    except OSError as error:
        raise BadOption(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise BadOption(f"{path} is no JSON, which the profiler writes") from None
    events = data.get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(events, list):
        return []
    found = [
        event
        for event in events
        if isinstance(event, dict) and (event.get("ph") == "X" or event.get("cat") == _MEMORY)
    ]
    return sorted(found, key=lambda event: float(event["ts"]))


def _marks_step(event: _Event) -> bool:
    return event.get("cat") == "user_annotation" and _STEP.fullmatch(str(event.get("name"))) is not None


def _on_device(events: list[_Event], mark: _Event) -> list[_Event]:
    """What the step began there: the device is behind the program, so times alone do not say it."""
    begun = {_correlation(event) for event in events if event.get("cat") in _CALLS and _within(event, mark)}
    return [event for event in events if event.get("cat") in _ON_DEVICE and _correlation(event) in begun]


def _on_host(events: list[_Event], mark: _Event) -> list[_Event]:
    return [event for event in events if event.get("cat") in _ON_HOST and _within(event, mark)]


def _within(event: _Event, mark: _Event) -> bool:
    begin_us = float(mark["ts"])
    return begin_us <= float(event["ts"]) < begin_us + float(mark["dur"])


def _correlation(event: _Event) -> object:
    return event.get("args", {}).get("correlation")


def _tracks(found: list[_Event]) -> dict[str, tuple[Happened, ...]]:
    """By stream or thread, in the order in which these began."""
    lanes: dict[object, list[_Event]] = defaultdict(list)
    begin_us = float(found[0]["ts"])
    for event in found:
        lanes[event.get("args", {}).get("stream", event.get("tid"))].append(event)
    return {
        f"{_kind(lane)}, {'stream' if lane[0]['cat'] in _ON_DEVICE else 'thread'} {number}": tuple(
            _happened(event, begin_us) for event in lane
        )
        for number, lane in lanes.items()
    }


def _happened(event: _Event, begin_us: float) -> Happened:
    return Happened(
        str(event["name"]),
        (float(event["ts"]) - begin_us) * 1e-6,
        float(event.get("dur", 0)) * 1e-6,
        int(event.get("args", {}).get("bytes", 0)),
    )


def _kind(lane: list[_Event]) -> str:
    """What a stream is for, by what it was longest busy with."""
    busy_us: dict[str, float] = defaultdict(float)
    for event in lane:
        kinds = (kind for way, kind in _DIRECTIONS.items() if way in event["name"])
        busy_us[next(kinds, "computing")] += float(event.get("dur", 0))
    return max(busy_us, key=lambda kind: busy_us[kind])
