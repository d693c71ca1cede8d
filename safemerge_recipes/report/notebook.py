"""How a plan shows itself in a notebook: a table by module type, and ρ by block as a picture.

A piece of HTML that stands in a stranger's page: no script, no style sheet, no network. Text from outside is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safemerge_recipes.report.overview import Line, Overview, read_plan
from safemerge_recipes.report.svg import ceiling, drawing, tag, text, ticks
from safemerge_recipes.text import fixed, median, things

MAX_KINDS = 40
"""Module types that are listed; the others are summed up."""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640.0, 180.0, 40.0, 10.0, 24.0
"""Of the picture, in pixels."""


def plan_html(plan: Mapping[str, Any]) -> str:
    """A plan as HTML.

    Args:
        plan: the content of safemerge_plan.json.
    """
    view = read_plan(plan)
    merged = sum(line.merged for line in view.gated)
    head = f"{merged} of {things(len(view.gated), 'gated tensor')} merge; {things(len(view.lines), 'tensor')} in all."
    parts = [tag("p", tag("b", text(view.name)) + " " + text(head))]
    parts += [tag("p", text(f"Warning: {warning}")) for warning in view.warnings[:10]]
    parts.append(_table(view))
    if any(line.rho is not None and line.block is not None for line in view.gated):
        parts.append(_picture(view))
    return tag("div", "".join(parts))


def _table(view: Overview) -> str:
    heads = "".join(tag("th", name) for name in ("module type", "merge", "gated", "ρ median", "ρ from", "to"))
    kinds = list(view.kinds().items())
    rows = [_row(kind, lines) for kind, lines in kinds[:MAX_KINDS]]
    if kinds[MAX_KINDS:]:
        rows.append(_row(f"{len(kinds) - MAX_KINDS} others", [line for _, more in kinds[MAX_KINDS:] for line in more]))
    rows.append(_row("all", view.gated))
    return tag("table", tag("thead", tag("tr", heads)) + tag("tbody", "".join(rows)))


def _row(kind: str, lines: Sequence[Line]) -> str:
    rhos = [line.rho for line in lines if line.rho is not None]
    ends = (fixed(min(rhos)), fixed(max(rhos))) if rhos else ("–", "–")
    cells = (kind, sum(line.merged for line in lines), len(lines), fixed(median(rhos)) if rhos else "–", *ends)
    return tag("tr", "".join(tag("td", text(cell)) for cell in cells))


def _picture(view: Overview) -> str:
    """For each block ρ from least to greatest as a line, its tensors as dots (filled: merged), τ dashed."""
    lines = [line for line in view.gated if line.rho is not None and line.block is not None]
    top = ceiling(max([*(line.rho or 0.0 for line in lines), *(line.tau_rho or 0.0 for line in lines)]))
    step = (WIDTH - LEFT) / max(1, len(view.blocks))

    def x(block: int | None) -> float:
        return LEFT + ((block or 0) + 0.5) * step

    def y(rho: float | None) -> float:
        return HEIGHT - BOTTOM - (rho or 0.0) / top * (HEIGHT - BOTTOM - TOP)

    marks = []
    for value, label in ticks(top):
        marks.append(_line(LEFT, y(value), WIDTH, y(value), stroke_opacity=0.15))
        marks.append(_label(LEFT - 6, y(value) + 4, label, "end"))
    for tau in sorted({line.tau_rho for line in lines if line.tau_rho is not None and line.metric == "rho"}):
        marks.append(_line(LEFT, y(tau), WIDTH, y(tau), stroke_dasharray="5 4"))
        marks.append(_label(WIDTH - 4, y(tau) - 4, "τ", "end"))
    for block in sorted({line.block for line in lines if line.block is not None}):
        here = [line for line in lines if line.block == block]
        rhos = [line.rho for line in here if line.rho is not None]
        marks.append(_line(x(block), y(min(rhos)), x(block), y(max(rhos)), stroke_opacity=0.4))
        marks += [_dot(x(block), y(line.rho), line) for line in here]
    first, last = view.blocks[0], view.blocks[-1]
    marks.append(_label(x(0), HEIGHT - 6, first, "middle"))
    if len(view.blocks) > 1:
        marks.append(_label(x(len(view.blocks) - 1), HEIGHT - 6, last, "middle"))
    return drawing(WIDTH, HEIGHT, "ρ by block; filled: merged", *marks, fixed=True)


def _line(x1: float, y1: float, x2: float, y2: float, **style: object) -> str:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke="currentColor", **style)


def _label(x: float, y: float, words: str, anchor: str) -> str:
    return tag("text", text(words, 40), x=x, y=y, text_anchor=anchor, font_size=11.0, fill="currentColor")


def _dot(x: float, y: float, line: Line) -> str:
    title = tag("title", text(f"{line.name}: ρ {fixed(line.rho)}, {'merged' if line.merged else 'kept'}"))
    fill = "currentColor" if line.merged else "none"
    return tag("circle", title, cx=x, cy=y, r=3.0, fill=fill, stroke="currentColor")
