"""Write docs/api.md from the docstrings of the public names: python docs/api.py"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import torchlms
import torchlms.steps

FILE = Path(__file__).with_name("api.md")

_HEAD = """# API

Written by `python docs/api.py` from the docstrings. Callbacks of trainers are in [trainers](trainers.md),
rules in [tuning](tuning.md).
"""


def text() -> str:
    """The page."""
    parts = [_HEAD]
    for module in (torchlms, torchlms.steps):
        for name in module.__all__:
            found = getattr(module, name)
            if not name.startswith("__"):
                parts.append(_entry(f"{module.__name__}.{name}", found))
    return "\n".join(parts)


def _entry(name: str, found: Any) -> str:
    lines = [f"## `{name}{_signature(found)}`\n", inspect.getdoc(found) or "", ""]
    if inspect.isclass(found) and not issubclass(found, BaseException):
        for member, item in vars(found).items():
            if member.startswith("_") or not inspect.getdoc(item):
                continue
            if isinstance(item, property):
                lines += [f"### `{member}`\n", inspect.getdoc(item) or "", ""]
            elif inspect.isfunction(item):
                lines += [f"### `{member}{_signature(item, bound=True)}`\n", inspect.getdoc(item) or "", ""]
    return "\n".join(lines)


def _signature(found: Any, *, bound: bool = False) -> str:
    if inspect.isclass(found) and issubclass(found, BaseException):
        return ""
    signature = inspect.signature(found)
    parameters = list(signature.parameters.values())[1 if bound else 0 :]
    return str(signature.replace(parameters=parameters)).replace("'", "").partition(" -> ")[0]


if __name__ == "__main__":
    FILE.write_text(text())
    sys.exit(0)
