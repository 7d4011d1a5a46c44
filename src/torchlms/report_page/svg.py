"""SVG: shapes as text. A drawing is a thousand wide and is stretched to its place, so it holds no text."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WIDTH = 1000.0


def drawing(shapes: Iterable[str], *, height: float, label: str) -> str:
    """The shapes, first at the back."""
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" preserveAspectRatio="none" role="img" '
        f"aria-label={quoteattr(label)}>{''.join(shapes)}</svg>"
    )


def stairs(
    xs: Sequence[float], ys: Sequence[float], end: float, key: str, *, ground: float | None = None
) -> str:
    """A line that keeps each y until the next x, the last one until ``end``; filled down to ``ground``."""
    if not xs:
        return ""
    path = [f"M{_n(xs[0])} {_n(ys[0])}"]
    before = ys[0]
    for x, y in zip(xs[1:], ys[1:], strict=True):
        if _n(y) != _n(before):
            path.append(f"H{_n(x)}V{_n(y)}")
            before = y
    path.append(f"H{_n(end)}")
    if ground is not None:
        path.append(f"V{_n(ground)}H{_n(xs[0])}Z")
    return f'<path class={quoteattr(key)} d="{"".join(path)}"/>'


def line(points: Sequence[tuple[float, float]], key: str) -> str:
    """Straight from point to point."""
    if not points:
        return ""
    return f'<path class={quoteattr(key)} d="M{"L".join(f"{_n(x)} {_n(y)}" for x, y in points)}"/>'


def bar(x: float, y: float, width: float, height: float, key: str, title: str) -> str:
    """A rectangle that says ``title`` to whoever points at it."""
    return (
        f'<rect class={quoteattr(key)} x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _n(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")
