"""A picture of many runs: one row a model, one column a quantity, a mark a run. Values in, SVG text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safemerge_recipes.report.scatter import STYLE, svg_file
from safemerge_recipes.report.svg import rule, tag, text, words


def strips(
    rows: Mapping[str, Sequence[Sequence[tuple[str, float]]]],
    columns: Sequence[tuple[str, float | None]],
    label: str,
    left: int = 170,
) -> str:
    """One row a model, one column a quantity, a mark a run; each column has a line at an aimed value, if any.

    Args:
        rows: Model -> for each column (kind of run, value). The first kind has a colour of its own.
        columns: (Name, aimed value or None).
        label: Of the whole picture.
        left: Pixels for the models' names.
    """
    wide, gap, row_high, top = 230, 40, 24, 44
    kinds = list(dict.fromkeys(kind for parts in rows.values() for part in parts for kind, _ in part))
    parts = [tag("style", STYLE)]
    for i, (name, aimed) in enumerate(columns):
        lines = [(0.0, "a", "end"), *([] if aimed is None else [(aimed, "front", "start")])]
        values = [value for cells in rows.values() for _, value in cells[i]] + [value for value, _, _ in lines]
        low, span = min(values), (max(values) - min(values)) or 1.0
        start = left + i * (wide + gap)

        def x(value: float, low: float = low, span: float = span, start: int = start) -> float:
            return start + wide * (value - low) / span

        bottom = top + row_high * len(rows)
        parts.append(words(start + wide / 2, 16, name, "h", "middle"))
        for value, style, anchor in lines:  # their words are apart where the lines are close
            parts.append(rule(x(value), top - 10, x(value), bottom, style))
            parts.append(words(x(value), top - 14, f"{value:g}", anchor=anchor))
        for value, anchor in ((low, "start"), (low + span, "end")):  # how far the marks go
            parts.append(words(x(value), bottom + 12, f"{value:.0f}", anchor=anchor))
        for j, (model, cells) in enumerate(rows.items()):
            at = top + row_high * j + row_high / 2
            parts.append(rule(start, at, start + wide, at, "g"))
            for kind, value in cells[i]:
                style = "point" if kind == kinds[0] else "chosen"
                title = f"{model}, {kind}: {name} {value:.1f}"
                parts.append(tag("circle", tag("title", text(title)), cx=x(value), cy=at, r=4.5, class_=style))
    for j, model in enumerate(rows):
        parts.append(words(left - 12, top + row_high * j + row_high / 2 + 4, model, anchor="end"))
    high = top + row_high * len(rows) + 44
    for i, kind in enumerate(kinds):
        parts.append(tag("circle", cx=float(left + 120 * i), cy=high - 10.0, r=4.5, class_=("point", "chosen")[i > 0]))
        parts.append(words(left + 120 * i + 10, high - 6, kind))
    return svg_file(left + len(columns) * (wide + gap), high, label, "".join(parts))
