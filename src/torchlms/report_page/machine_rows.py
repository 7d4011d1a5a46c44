"""Machine rows: the rates and sizes of a machine, as a person reads them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torchlms.memory.limits import format_bytes

if TYPE_CHECKING:
    from torchlms.core.machine import Machine


def machine_rows(machine: Machine) -> list[list[str]]:
    """What, and its figure."""
    rows: list[list[str]] = []
    for field in dataclasses.fields(machine):
        value = getattr(machine, field.name)
        if field.name == "link":
            for point in value:
                out, back = (point.size_bytes / max(s, 1e-12) / 1e9 for s in (point.out_s, point.in_s))
                size = format_bytes(point.size_bytes)
                rows.append([f"link, {size}", f"{out:.1f} GB/s out, {back:.1f} GB/s in"])
        elif field.name.endswith("_bytes_per_s"):
            name = field.name.removesuffix("_bytes_per_s").replace("_", " ")
            rows.append([name, f"{value / 1e9:.2f} GB/s" if value else "not measured"])
        elif field.name.endswith("_bytes"):
            name = field.name.replace("_", " ")
            rows.append([name, format_bytes(value) if value >= 0 else "unlimited"])
        else:
            figure = f"{value:.3g}" if isinstance(value, float) else str(value)
            rows.append([field.name.replace("_", " "), figure])
    return rows
