"""Pictures of sweeps and probes as SVG files of their own: safety against utility, and change beside ρ.

Values in, text out. The files need no network and follow the viewer's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safemerge_recipes.report.svg import rule, tag, text, words

STYLE = """
:root{color-scheme:light dark}
text{font:12px system-ui,sans-serif;fill:#1b1f24}.t{fill:#57606a}.h{font-weight:600}
.a{stroke:#8c959f;stroke-width:1}.g{stroke:#d8dee4;stroke-width:1}.w{stroke:#afb8c1;stroke-width:1}
.point{fill:#0969da}.control{fill:none;stroke:#8c959f}.reference{fill:#57606a}.chosen{fill:#bf3989}
.front{fill:none;stroke:#0969da;stroke-width:1.2;stroke-dasharray:4 3}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.t{fill:#9ea7b3}.a{stroke:#768390}.g{stroke:#30363d}
.w{stroke:#57606a}.point{fill:#58a6ff}.control{stroke:#768390}.reference{fill:#adbac7}.chosen{fill:#f778ba}
.front{stroke:#58a6ff}}
"""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 420, 56, 44, 36, 150


@dataclass(frozen=True, slots=True)
class Mark:
    """One model: rates in [0, 1] with 95 % intervals, and a kind: point, control, reference or chosen."""

    label: str
    kind: str
    utility: float
    safety: float
    utility_interval: tuple[float, float] | None = None
    safety_interval: tuple[float, float] | None = None


def front(marks: Sequence[Mark]) -> list[Mark]:
    """The marks that no other beats in one rate without losing in the other, by utility."""
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (-m.utility, -m.safety)):
        if not found or mark.safety > found[-1].safety:
            found.append(mark)
    return found[::-1]


def scatter(marks: Sequence[Mark], x_name: str, y_name: str) -> str:
    """Safety upwards, utility to the right, whiskers for intervals; tooltips name every mark."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    top = min(1.0, max((m.utility_interval[1] if m.utility_interval else m.utility for m in marks), default=1.0) * 1.1)
    scale = top or 1.0

    def x(value: float) -> float:
        return LEFT + wide * value / scale

    def y(value: float) -> float:
        return TOP + high * (1 - value)

    parts = [tag("style", STYLE)]
    for i in range(5):
        parts += [rule(LEFT, y(i / 4), LEFT + wide, y(i / 4), "g")]
        parts += [words(LEFT - 6, y(i / 4) + 4, f"{25 * i} %", anchor="end")]
        parts += [words(x(scale * i / 4), TOP + high + 16, f"{25 * i * scale:.0f} %", anchor="middle")]
    parts += [rule(LEFT, TOP + high, LEFT + wide, TOP + high, "a"), rule(LEFT, TOP, LEFT, TOP + high, "a")]
    parts += [words(LEFT + wide / 2, HEIGHT - 8, x_name, "h", "middle"), words(8, 14, y_name, "h")]
    edge = front([mark for mark in marks if mark.kind != "control"])
    if len(edge) > 1:
        line = " ".join(f"{x(m.utility):.1f},{y(m.safety):.1f}" for m in edge)
        parts.append(tag("polyline", points=line, class_="front"))
    order = {"control": 0, "point": 1, "reference": 2, "chosen": 3}
    for m in sorted(marks, key=lambda m: order.get(m.kind, 1)):
        if m.kind != "control" and m.safety_interval and m.utility_interval:
            parts.append(rule(x(m.utility), y(m.safety_interval[0]), x(m.utility), y(m.safety_interval[1]), "w"))
            parts.append(rule(x(m.utility_interval[0]), y(m.safety), x(m.utility_interval[1]), y(m.safety), "w"))
        title = f"{m.label}: {y_name} {m.safety:.1%}, {x_name} {m.utility:.1%}"
        parts.append(
            tag("circle", tag("title", text(title)), cx=x(m.utility), cy=y(m.safety), r=4.5, class_=m.kind)
        )  # fmt: skip
        if m.kind in ("reference", "chosen"):
            parts.append(words(x(m.utility) + 8, y(m.safety) - 6, m.label))
    for i, (kind, name) in enumerate(
        (("point", "swept"), ("chosen", "chosen"), ("reference", "source"), ("control", "control"))
    ):
        if any(m.kind == kind for m in marks):
            parts.append(tag("circle", cx=WIDTH - RIGHT + 30, cy=float(TOP + 20 * i), r=4.5, class_=kind))
            parts.append(words(WIDTH - RIGHT + 42, TOP + 20 * i + 4, name))
    return svg_file(WIDTH, HEIGHT, f"{y_name} against {x_name}", "".join(parts))


def heat_map(
    cells: Mapping[tuple[str, str], Mapping[str, float]], columns: Sequence[str], label: str, alike: Sequence[str] = ()
) -> str:
    """One row an (item, note), one column a quantity, each column scaled by its own largest magnitude.

    Columns that are `alike` share theirs. Positive values are blue, negative ones red; every cell says its number.
    """
    width, row_high, left = 300 + 120 * len(columns), 18, 290
    parts = [tag("style", STYLE)]
    tops = {c: max((abs(v[c]) for v in cells.values() if c in v), default=0.0) for c in columns}
    tops |= dict.fromkeys(alike, max((tops[column] for column in alike), default=0.0))
    for i, column in enumerate(columns):
        parts.append(words(left + 120 * i + 56, 16, column, "h", "middle"))
    for j, ((name, note), values) in enumerate(cells.items()):
        at = 24 + row_high * j
        parts.append(words(left - 8, at + 13, f"{name} {note}".strip()[-46:], anchor="end"))
        for i, column in enumerate(columns):
            if column not in values:
                continue
            value = values[column]
            colour = "#0969da" if value >= 0 else "#cf222e"
            strength = round(0.65 * abs(value) / (tops[column] or 1.0), 3)
            parts.append(
                tag("rect", x=float(left + 120 * i), y=float(at), width=114.0, height=float(row_high - 2), fill=colour,
                    fill_opacity=str(strength))
            )  # fmt: skip
            parts.append(words(left + 120 * i + 57, at + 13, f"{value:+.3f}", "n", "middle"))
    return svg_file(width, 32 + row_high * len(cells), label, "".join(parts))


def svg_file(width: float, height: float, label: str, content: str) -> str:
    """An SVG file of its own with this content."""
    head = tag(
        "svg",
        content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="img",
        aria_label=label,
    )
    return head + "\n"
