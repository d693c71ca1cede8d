"""Marks and axes of inline SVG as text. Everything given as text is escaped; knows no plan.

Colours live in the style sheet: marks carry classes, so light, dark and print need one drawing.
"""

from __future__ import annotations

import math
from html import escape

from safemerge_recipes.text import clean, figure


def text(value: object, limit: int = 400) -> str:
    """Outside text, cleaned and escaped for HTML content and quoted attributes."""
    return escape(clean(value, limit), quote=True)


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """An element. Attribute values are escaped, content is not; `class_` is class, `_` becomes `-`."""
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        shown = _short(value) if isinstance(value, float) else text(value, 2000)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{shown}"')
    return f"<{' '.join(parts)}>{content}</{name}>" if content or name not in _VOID else f"<{' '.join(parts)}/>"


_VOID = frozenset({"circle", "line", "rect", "path"})


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def drawing(width: float, height: float, label: str, *content: str, class_: str = "", fixed: bool = False) -> str:
    """A drawing that is announced by its label; it scales unless its size is `fixed`. No label hides it."""
    return tag(
        "svg",
        "".join(content),
        viewBox=f"0 0 {_short(width)} {_short(height)}",
        width=float(width) if fixed else None,
        height=float(height) if fixed else None,
        role="img" if label else None,
        aria_label=label or None,
        aria_hidden=None if label else "true",
        class_=class_ or None,
    )


def words(x: float, y: float, content: object, class_: str = "t", anchor: str = "start") -> str:
    """A short text with its baseline at y."""
    return tag("text", text(content, 120), x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def rule(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def dot(x: float, y: float, merged: bool, title: str, radius: float = 3.2) -> str:
    """A merged (filled) or kept (hollow) tensor; the title is its tooltip."""
    return tag(
        "circle",
        tag("title", text(title)),
        cx=float(x),
        cy=float(y),
        r=float(radius),
        class_="m" if merged else "k",
    )


def ceiling(value: float) -> float:
    """The least number not below the value whose quarters read well."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        (step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8) if step * power >= value * (1 - 1e-9)),
        10 * power,
    )


def ticks(top: float, parts: int = 4) -> list[tuple[float, str]]:
    """Values from 0 to `top` in equal parts, with their labels."""
    return [(top * i / parts, figure(top * i / parts, 3)) for i in range(parts + 1)]


def steps(runs: list[tuple[float, float, float]], class_: str) -> str:
    """Horizontal segments (x1, x2, y), joined to one path where they meet."""
    path, last = "", None
    for x1, x2, y in runs:
        joined = last is not None and abs(last[0] - x1) < 1e-6
        path += f"L{_short(x1)} {_short(y)}" if joined else f"M{_short(x1)} {_short(y)}"
        path += f"H{_short(x2)}"
        last = (x2, y)
    return tag("path", d=path, class_=class_) if path else ""
