"""The charts of the report, drawn from an overview: ρ by block, heat map, ρ/ρ₀, norms, scores.

What is drawn is a cell: the gated tensors of one module type in one block, usually one, with experts many. So
the size of a chart is bounded by blocks × module types, whatever the number of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from safemerge_recipes.report.overview import Line, Overview
from safemerge_recipes.report.scores import Score, interval, shown
from safemerge_recipes.report.svg import ceiling, dot, drawing, rule, steps, tag, text, ticks, words
from safemerge_recipes.text import figure, fixed, median, things

MAX_BLOCKS = 160
"""Blocks that are drawn."""
MAX_KINDS = 24
"""Module types that are drawn."""
HEAT_STEPS = 10
"""Colours of the heat map; the style sheet has as many."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The gated tensors of one module type in one block, summed up."""

    kind: str
    column: int
    block: str
    lines: tuple[Line, ...]

    @property
    def merged(self) -> bool:
        """Whether at least half of the tensors merge."""
        return 2 * sum(line.merged for line in self.lines) >= len(self.lines)

    def values(self, of: Callable[[Line], float | None]) -> list[float]:
        """A figure of the tensors that have it."""
        return [value for line in self.lines if (value := of(line)) is not None]

    def middle(self, of: Callable[[Line], float | None]) -> float | None:
        """The median of a figure."""
        return median(self.values(of))

    @property
    def title(self) -> str:
        """What the cell says when pointed at."""
        rho, null = self.values(lambda line: line.rho), self.middle(lambda line: line.rho_null)
        if len(self.lines) == 1:
            line = self.lines[0]
            head = f"{line.name}: {'merged' if line.merged else 'kept'}"
        else:
            count = sum(line.merged for line in self.lines)
            head = f"block {self.block}, {self.kind}: {count} of {things(len(self.lines), 'tensor')} merged"
        if not rho:
            return head
        spread = f" ({fixed(min(rho))} to {fixed(max(rho))})" if len(rho) > 1 else ""
        return f"{head}, ρ {fixed(median(rho))}{spread}" + (f", ρ₀ {fixed(null)}" if null is not None else "")


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells that are drawn, by module type, over columns of blocks; what is left out is counted."""

    rows: dict[str, list[Cell]]
    blocks: tuple[str, ...]
    left_out: int


def _rho(line: Line) -> float | None:
    return line.rho


def grid(view: Overview) -> Grid:
    """Cells of the first module types and blocks; tensors outside blocks get a column of their own, first."""
    kinds = view.kinds()
    used = sorted({line.block for line in view.gated if line.block is not None})
    outside = any(line.block is None for line in view.gated)
    columns: dict[int | None, int] = {None: 0} if outside else {}
    for block in used[:MAX_BLOCKS]:
        columns[block] = len(columns)
    labels = tuple("–" if block is None else view.blocks[block] for block in columns)
    rows: dict[str, list[Cell]] = {}
    left = 0
    for kind, lines in kinds.items():
        if len(rows) == MAX_KINDS:
            left += len(lines)
            continue
        found: dict[int, list[Line]] = {}
        for line in lines:
            if line.block in columns:
                found.setdefault(columns[line.block], []).append(line)
            else:
                left += 1
        rows[kind] = [Cell(kind, at, labels[at], tuple(found[at])) for at in sorted(found)]
    return Grid(rows, labels, left)


def every(count: int, most: int) -> int:
    """The step between labels so that at most about `most` are shown."""
    return next((step for step in (1, 2, 4, 5, 8, 10, 16, 20, 40) if count <= step * most), max(1, count // most))


# ρ by block


def panels(cells: Grid) -> list[str]:
    """One drawing a module type: ρ over blocks with τ and ρ₀."""
    drawn = [
        value
        for row in cells.rows.values()
        for cell in row
        for of in (_rho, lambda line: line.tau_rho, lambda line: line.rho_null)
        for value in cell.values(of)
    ]
    top = ceiling(max(drawn, default=1.0))
    return [
        _panel(kind, row, cells.blocks, top) for kind, row in cells.rows.items() if any(c.values(_rho) for c in row)
    ]


def _panel(kind: str, row: list[Cell], blocks: tuple[str, ...], top: float) -> str:
    left, right, upper, lower, width = 34.0, 8.0, 26.0, 132.0, 320.0
    step = (width - left - right) / max(1, len(blocks))

    def x(column: float) -> float:
        return left + (column + 0.5) * step

    def y(value: float) -> float:
        return lower - min(value, top) / top * (lower - upper)

    parts = [
        words(0, 12, kind, "h"),
        words(width - right, 12, f"{_merged(row)} of {_tensors(row)} merged", "t", "end"),
    ]
    for value, label in ticks(top):
        parts += [
            rule(left, y(value), width - right, y(value), "g"),
            words(left - 6, y(value) + 3.5, label, "t", "end"),
        ]
    for column in range(0, len(blocks), every(len(blocks), 8)):
        parts.append(words(x(column), lower + 15, blocks[column], "t", "middle"))
    for class_, of in (("null", lambda line: line.rho_null), ("tau", lambda line: line.tau_rho)):
        runs = [
            (x(cell.column) - step / 2, x(cell.column) + step / 2, y(at))
            for cell in row
            if (at := cell.middle(of)) is not None
        ]
        parts.append(steps(runs, class_))
    for cell in row:
        rhos = cell.values(_rho)
        if not rhos:
            continue
        if len(rhos) > 1:
            parts.append(rule(x(cell.column), y(min(rhos)), x(cell.column), y(max(rhos)), "span"))
        parts.append(
            dot(
                x(cell.column),
                y(median(rhos) or 0.0),
                cell.merged,
                cell.title,
                min(3.2, max(1.6, step / 2.4)),
            )
        )
    count = _merged(row)
    label = f"{kind}: ρ by block, {count} of {_tensors(row)} merged"
    return drawing(width, 152, label, *parts)


def _merged(row: list[Cell]) -> int:
    return sum(line.merged for cell in row for line in cell.lines)


def _tensors(row: list[Cell]) -> int:
    return sum(len(cell.lines) for cell in row)


# Heat map


def heat_map(cells: Grid) -> str:
    """Block × module type, coloured by ρ where it was measured; a dot where at least half merge."""
    left, upper, width, height = 168.0, 20.0, 1000.0, 24.0
    step = min(40.0, (width - left) / max(1, len(cells.blocks)))
    width = left + step * len(cells.blocks)
    top = heat_top(cells)
    parts = []
    for column in range(0, len(cells.blocks), every(len(cells.blocks), 32)):
        parts.append(words(left + (column + 0.5) * step, upper - 7, cells.blocks[column], "t", "middle"))
    for index, (kind, row) in enumerate(cells.rows.items()):
        y = upper + index * height
        parts.append(words(left - 8, y + height / 2 + 4, kind if len(kind) <= 26 else f"…{kind[-25:]}", "h", "end"))
        for cell in row:
            x = left + cell.column * step
            rho = cell.middle(_rho)
            heat = "none" if rho is None else min(HEAT_STEPS - 1, int(rho / top * HEAT_STEPS))
            marks = tag("title", text(cell.title))
            marks += tag("rect", x=x, y=float(y), width=step - min(1.0, step / 6), height=height - 1, class_=f"q{heat}")
            if cell.merged:
                marks += tag(
                    "circle",
                    cx=x + step / 2 - 0.5,
                    cy=y + height / 2 - 0.5,
                    r=min(4.2, step / 2.6),
                    class_="hm",
                )
            parts.append(tag("g", marks))
    label = f"Heat map of {len(cells.rows)} module types by {len(cells.blocks)} blocks; dots mark merged"
    # Few blocks keep their size; many fill the page, and scroll where it is narrow.
    few = len(cells.blocks) <= 16
    height = upper + height * len(cells.rows)
    return drawing(width, height, label, *parts, class_="few" if few else "wide", fixed=few)


def heat_top(cells: Grid) -> float:
    """The ρ of the strongest colour."""
    found = [value for row in cells.rows.values() for cell in row if (value := cell.middle(_rho)) is not None]
    return ceiling(max(found, default=1.0))


def heat_scale(cells: Grid) -> str:
    """The legend of the heat map's colours."""
    top, step = heat_top(cells), 16.0
    parts = [tag("rect", x=i * step, y=0.0, width=step, height=10.0, class_=f"q{i}") for i in range(HEAT_STEPS)]
    parts += [words(0, 22, "ρ 0"), words(step * HEAT_STEPS, 22, figure(top), "t", "end")]
    return drawing(step * HEAT_STEPS, 26, f"Colours from ρ 0 to {figure(top)}", *parts, class_="scale")


# ρ/ρ₀


def ratios(cells: Grid) -> str:
    """A strip a module type: ρ/ρ₀ with 1 marked, first block uppermost."""
    rows = {kind: [c for c in row if c.values(lambda line: line.ratio)] for kind, row in cells.rows.items()}
    rows = {kind: row for kind, row in rows.items() if row}
    if not rows:
        return ""
    left, right, upper, height, width = 8.0, 16.0, 4.0, 50.0, 560.0
    drawn = [value for row in rows.values() for cell in row for value in cell.values(lambda line: line.ratio)]
    top = ceiling(max(1.1, *drawn))
    lower = upper + height * len(rows)

    def x(value: float) -> float:
        return left + min(value, top) / top * (width - left - right)

    parts = []
    for value, label in ticks(top):
        parts += [
            rule(x(value), upper, x(value), lower, "g"),
            words(x(value), lower + 15, label, "t", "middle"),
        ]
    parts.append(rule(x(1), upper, x(1), lower, "null"))
    for index, (kind, row) in enumerate(rows.items()):
        middle = upper + (index + 1) * height - 17
        parts.append(words(left, middle - 18, kind, "h"))
        taus = [v for cell in row for v in cell.values(lambda line: line.tau_ratio) if v <= top]
        if taus:
            low, high = x(min(taus)), x(max(taus))
            parts.append(tag("rect", x=low - 0.75, y=middle - 13, width=high - low + 1.5, height=26.0, class_="band"))
        for cell in row:
            ratio = cell.middle(lambda line: line.ratio) or 0.0
            shift = (cell.column / (len(cells.blocks) - 1) - 0.5) * 20 if len(cells.blocks) > 1 else 0.0
            parts.append(dot(x(ratio), middle + shift, cell.merged, f"{cell.title}, ρ/ρ₀ {figure(ratio)}", 2.8))
    label = f"ρ/ρ₀ of {len(rows)} module types; 1 is an unrelated update"
    return drawing(width, lower + 20, label, *parts, class_="fit")


# Norms


def norms(cells: Grid) -> str:
    """‖Δf‖ over ‖V‖, both logarithmic, a dot a cell."""
    points = [
        (cell, v, d)
        for row in cells.rows.values()
        for cell in row
        if (v := cell.middle(lambda line: line.norm_v)) and (d := cell.middle(lambda line: line.norm_delta))
    ]
    if not points:
        return ""
    left, right, upper, lower, width = 44.0, 14.0, 26.0, 290.0, 560.0
    across = _Log([v for _, v, _ in points], left, width - right)
    up = _Log([d for _, _, d in points], lower, upper)
    parts = []
    for value, label in across.ticks():
        parts += [
            rule(across(value), upper, across(value), lower, "g"),
            words(across(value), lower + 16, label, "t", "middle"),
        ]
    for value, label in up.ticks():
        parts += [
            rule(left, up(value), width - right, up(value), "g"),
            words(left - 6, up(value) + 3.5, label, "t", "end"),
        ]
    parts += [words(width - right, lower + 34, "‖V‖", "h", "end"), words(4, 12, "‖Δf‖", "h")]
    for cell, v, d in points:
        parts.append(dot(across(v), up(d), cell.merged, f"{cell.title}, ‖V‖ {figure(v)}, ‖Δf‖ {figure(d)}", 3.4))
    return drawing(width, lower + 40, "Norm of the update over norm of V", *parts, class_="fit")


class _Log:
    """A logarithmic scale that holds the values with a little room."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        self.low, self.high = math.log10(min(values)), math.log10(max(values))
        room = max(0.06 * (self.high - self.low), 0.02)
        self.low, self.high = self.low - room, self.high + room
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Powers of ten and, where those are few, 2 and 5 times them, or finer."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for parts in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8)):
            found = [m * 10.0**p for p in decades for m in parts if self.low <= math.log10(m) + p <= self.high]
            if len(found) >= 3:
                break
        kept = found[:: max(1, -(-len(found) // 9))]
        return [(value, figure(value)) for value in kept]


# Scores


def score_bar(row: Score, rate: bool, low: float, high: float) -> str:
    """One value with its interval on a scale from `low` to `high`."""
    width, middle = 220.0, 10.0

    def x(value: float) -> float:
        return 4 + (value - low) / ((high - low) or 1.0) * (width - 8)

    parts = [rule(4, middle, width - 4, middle, "g")]
    if row.low is not None and row.high is not None:
        parts.append(rule(x(row.low), middle, x(row.high), middle, "interval"))
    parts.append(dot(x(row.value), middle, row.model == "merged", f"{row.model}: {shown(row.value, rate)}", 4.5))
    between = interval(row, rate)
    return drawing(width, 20, f"{shown(row.value, rate)}" + (f", 95 % interval {between}" if between else ""), *parts)
