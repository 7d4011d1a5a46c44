"""Live line: on a terminal, what LMS is doing while a step takes long or many steps go by. It takes a second
line where the terminal is narrow.

It is renewed where an optimizer's step ends, in the thread that trains: nobody else may ask LMS for its
figures while a step runs. Scripts under ``torchlms run`` do without it unless asked: they have lines of
their own, a progress bar among them, which a second one would tear.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchlms.memory.limits import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    Stats = Callable[[], dict[str, Any]]
    Listen = Callable[[Callable[..., None]], Any]  # what it gives has remove()

_EVERY_S = 0.25


@contextmanager
def live_line(
    stats: Stats,
    console: Console | None = None,
    *,
    items: int = 0,
    unit: str = "items",
    listen: Listen | None = None,
) -> Iterator[None]:
    """One line on ``console`` (standard error) as long as this is open; none if that is no terminal, or if
    TORCHLMS_LOG is off. What is printed meanwhile appears above it, and it leaves no trace.

    ``items`` is how many there are in a step of the optimizer, 0 if nobody knows. ``listen`` gets what is to
    be called where such a step ends; None: every optimizer tells.
    """
    from rich.console import Console

    console = console if console is not None else Console(stderr=True)
    if not console.is_terminal or os.environ.get("TORCHLMS_LOG", "").lower() == "off":
        yield
        return
    from rich.live import Live
    from torch.optim.optimizer import register_optimizer_step_post_hook

    # Without a thread that draws: it would take the interpreter from the program that is being timed.
    shared = sys.stdout.isatty()  # else what is printed goes elsewhere, and must
    line = Live(
        _lines("starting", console.width),
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=shared,
    )
    with line as live:
        renewed_s, step, renewed_step = time.perf_counter(), 0, 0

        def step_ended(*_: Any) -> None:
            nonlocal renewed_s, step, renewed_step
            step += 1
            passed_s = time.perf_counter() - renewed_s
            if passed_s < _EVERY_S:
                return
            step_s = passed_s / (step - renewed_step)
            said = sentence(stats(), step=step, step_s=step_s, items=items, unit=unit)
            live.update(_lines(said, console.width), refresh=True)
            renewed_s, renewed_step = time.perf_counter(), step

        live.refresh()
        hook = (listen or register_optimizer_step_post_hook)(step_ended)
        try:
            yield
        finally:
            hook.remove()


def sentence(
    stats: dict[str, Any], *, step: int = 0, step_s: float = 0.0, items: int = 0, unit: str = "items"
) -> str:
    """What LMS does now, by its figures, and what that takes. ``step`` counts those of the optimizer, which
    took ``step_s`` each of late, with all that the loop does beside them."""
    if stats["state"] == "off":
        return "a run without LMS"
    parts = [_doing(stats), f"step {step}"]
    if step_s:
        parts.append(f"{step_s * 1e3:.0f} ms")
        if items:
            parts.append(f"{items / step_s:.0f} {unit}/s")
    parts.append(f"device {_pair(stats['peak_device_bytes'], stats['budget_bytes'])}")
    if stats["peak_host_bytes"]:
        parts.append(f"host {_pair(stats['peak_host_bytes'], stats['host_budget_bytes'])}")
    if stats["bytes_out_per_step"]:
        parts.append(f"out/in {_pair(stats['bytes_out_per_step'], stats['bytes_in_per_step'])}")
    if stats["reclaims"]:
        parts.append(f"{stats['reclaims']} reclaims")
    return ", ".join(parts)


def _pair(one_bytes: int, other_bytes: int) -> str:
    """``15.0/16.0 GiB``: short, so that a terminal of 80 columns shows all there is in two lines."""
    one, other = format_bytes(one_bytes), format_bytes(other_bytes)
    same_unit = one.split()[1] == other.split()[1]
    return f"{one.split()[0] if same_unit else one}/{other}"


def folded(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width``, broken at its commas; all but the first begin further in."""
    lines = [""]
    for part in text.split(", "):
        longer = f"{lines[-1]}, {part}" if lines[-1] else part
        if lines[-1] and len(longer) >= width:  # a comma may follow
            lines[-1] += ","
            lines.append(f"  {part}")
        else:
            lines[-1] = longer
    return lines


def _doing(stats: dict[str, Any]) -> str:
    if stats["state"] == "aside":
        return "everything fits, LMS stands aside"
    if stats["state"] == "record":
        return "recording, which is slow"
    if stats["lessons"]:
        return "learning where memory is tight"
    if stats.get("racing"):
        return "trying one plan after the other"
    return "following a plan"


def _lines(text: str, width: int) -> Any:
    from rich.text import Text

    shown = "\n".join(folded(f"torchlms: {text}", width))
    return Text(shown, no_wrap=True, overflow="ellipsis", style="dim")
