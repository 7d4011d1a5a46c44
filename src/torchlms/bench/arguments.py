"""Arguments: options back to the command line that gives them, for a run in a process of its own."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum

from torchlms.bench.options import BenchOptions

_DEFAULTS = BenchOptions()


def to_arguments(options: BenchOptions) -> list[str]:
    """What to put after ``torchlms bench``; options at their default are left out, the way never."""
    arguments: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value == getattr(_DEFAULTS, field.name) and field.name != "way":
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            arguments += [part for item in value for part in (flag, item)]
        else:
            arguments += [flag, str(value.value if isinstance(value, Enum) else value)]
    return arguments
