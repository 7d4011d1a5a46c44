"""Rule text: rules as they are written on a command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torchlms.core.rules import Rules
from torchlms.errors import BadOption
from torchlms.memory.limits import parse_bytes

_EXAMPLE = "write --rule name=value, for example --rule keep_modules=layer1,layer2 or --rule min_bytes=4MiB"


def read_rules(texts: Iterable[str], *, recompute: bool = True) -> dict[str, Any] | None:
    """The keyword ``rules`` of ``LMS`` from texts such as ``"keep_ops=aten.relu*,aten.gelu*"``; None for no
    rule. BadOption says which text cannot be read."""
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or not value.strip():
            raise BadOption(f"cannot read the rule {text!r}: {_EXAMPLE}")
        if name in found:
            raise BadOption(f"the rule {name} is given twice; its patterns are separated by commas")
        found[name] = _value(name, value.strip())
    if not recompute:
        found["recompute"] = False
    Rules.read(found)  # says what is wrong now, not once the network is built
    return found or None


def with_sizes(rules: dict[str, Any]) -> dict[str, Any]:
    """``rules`` with sizes such as ``"4MiB"`` as bytes."""
    sizes = {
        name: _size(value)
        for name, value in rules.items()
        if name.endswith("_bytes") and isinstance(value, str)
    }
    return rules | sizes


def _size(text: str) -> int:
    """A size of a rule, which may be nothing at all."""
    return parse_bytes(text) if text != "0" else 0


def _value(name: str, text: str) -> Any:
    kinds = {field.name: str(field.type) for field in fields(Rules)}
    kind = kinds.get(name, "")
    if name.endswith("_bytes"):
        return _size(text)
    if kind.startswith("tuple"):
        return tuple(part.strip() for part in text.split(","))
    if kind.startswith("int"):
        try:
            return int(text)
        except ValueError:
            raise BadOption(f"the rule {name} needs a whole number, not {text!r}") from None
    if kind == "bool":
        if text not in ("true", "false"):
            raise BadOption(f"the rule {name} is true or false, not {text!r}")
        return text == "true"
    return text
