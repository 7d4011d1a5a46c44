"""Chart: a drawing with its ticks, marks and legend, ready to be put on the page."""

from __future__ import annotations

from dataclasses import dataclass

from torchlms.report_page.axis import Tick


@dataclass(frozen=True, slots=True)
class Key:
    """A line of the legend: the colour's key and what it stands for. ``line``: a line, not an area."""

    key: str
    name: str
    note: str = ""
    line: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """A point with a name, at shares of both axes."""

    x: float
    y: float
    key: str
    name: str


@dataclass(frozen=True, slots=True)
class Chart:
    """``svg`` fills the area; text stands beside it at shares of the axes, so that it keeps its size."""

    svg: str
    height_px: int
    x_ticks: tuple[Tick, ...] = ()
    y_ticks: tuple[Tick, ...] = ()
    legend: tuple[Key, ...] = ()
    dots: tuple[Dot, ...] = ()
    names: tuple[Tick, ...] = ()  # of rows, at shares of the height from the top
    timed: bool = False  # its x axis is the step
