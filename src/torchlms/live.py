"""Live line: on a terminal, what LMS is doing while a step takes long or many steps go by.

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
    Listen = Callable[[Callable[..., None]], Any]

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

    ``items`` is how many there are in a step, 0 if nobody knows. ``listen`` gets what is to be called where
    a step ends; None: every optimizer tells.
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
        _line("starting"), console=console, auto_refresh=False, transient=True, redirect_stdout=shared
    )
    with line as live:
        renewed_s = time.perf_counter()

        def step_ended(*_: Any) -> None:
            nonlocal renewed_s
            if time.perf_counter() - renewed_s < _EVERY_S:
                return
            live.update(_line(sentence(stats(), items, unit)), refresh=True)
            renewed_s = time.perf_counter()

        live.refresh()
        hook = (listen or register_optimizer_step_post_hook)(step_ended)
        try:
            yield
        finally:
            hook.remove()


def sentence(stats: dict[str, Any], items: int = 0, unit: str = "items") -> str:
    """What LMS does now, by its figures, and what that takes."""
    if stats["state"] == "off":
        return "a run without LMS"
    parts = [_doing(stats), f"step {stats['steps']}"]
    if stats["measured_step_s"]:
        parts.append(f"{stats['measured_step_s'] * 1e3:.0f} ms")
        if items:
            parts.append(f"{items / stats['measured_step_s']:.0f} {unit}/s")
    parts.append(
        f"device {format_bytes(stats['peak_device_bytes'])} of {format_bytes(stats['budget_bytes'])}"
    )
    if stats["peak_host_bytes"]:
        host, most = format_bytes(stats["peak_host_bytes"]), format_bytes(stats["host_budget_bytes"])
        parts.append(f"host {host} of {most}")
    if stats["bytes_out_per_step"]:
        out, back = format_bytes(stats["bytes_out_per_step"]), format_bytes(stats["bytes_in_per_step"])
        parts.append(f"{out} out and {back} in per step")
    if stats["reclaims"]:
        parts.append(f"{stats['reclaims']} reclaims")
    return ", ".join(parts)


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


def _line(text: str) -> Any:
    from rich.text import Text

    return Text(f"torchlms: {text}", no_wrap=True, overflow="ellipsis", style="dim")
