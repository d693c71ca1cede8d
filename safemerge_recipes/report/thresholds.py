"""What every τ would merge: the tensors whose decision follows `gate.tau`, by module type and block.

Overview in, plain data and one drawing out. Tensors that a rule decides, and those without a value of the
metric, stay as they are at every τ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from safemerge_recipes.report.charts import Grid, every
from safemerge_recipes.report.overview import Line, Overview, mapping, selector
from safemerge_recipes.report.svg import drawing, tag, words
from safemerge_recipes.text import number

STEPS = 400
"""Positions of the slider."""
COLUMNS = 7
"""Values of τ in the table."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The choice of τ. `key` is the selector that `--set` gives; `above` merges where the metric is high."""

    key: str
    metric: str
    above: bool
    chosen: float | None
    low: float
    high: float
    step: float
    columns: tuple[float, ...]
    rows: tuple[tuple[str, tuple[Line, ...]], ...]

    def follows(self, line: Line) -> bool:
        """Whether a tensor's decision would change with τ."""
        return _follows(line, self.metric)

    def merges(self, line: Line, tau: float) -> bool:
        """Whether a tensor would merge at this τ."""
        if line.value is None or not self.follows(line):
            return line.merged
        if self.key == "at_most":
            return line.value >= tau if self.above else line.value <= tau
        return line.value > tau if self.above else line.value < tau

    def count(self, lines: tuple[Line, ...], tau: float) -> int:
        """How many of these tensors would merge."""
        return sum(self.merges(line, tau) for line in lines)

    def total(self, tau: float) -> int:
        """How many of all gated tensors would merge."""
        return sum(self.count(lines, tau) for _, lines in self.rows)

    def setting(self, tau: float) -> str:
        """What to say on the command line."""
        return f"--set gate.{self.key}={_plain(tau)}"


def _follows(line: Line, metric: str) -> bool:
    return line.gated and not line.ruled and line.value is not None and line.metric == metric


def _plain(value: float) -> str:
    return f"{value:.6g}"


def thresholds(view: Overview) -> Thresholds | None:
    """The choice of τ in a plan; None where fewer than two tensors would follow it."""
    gate = mapping(view.recipe.get("gate"))
    key, value = selector(gate)
    metric = next((line.metric for line in view.gated if not line.ruled and line.value is not None), "")
    values = sorted(v for line in view.gated if _follows(line, metric) and (v := line.value) is not None)
    if len(values) < 2 or values[0] == values[-1]:
        return None
    chosen = number(value) if key in ("tau", "at_most") else None
    step = _step((values[-1] - values[0]) / STEPS)
    ends = [*values, *([chosen] if chosen is not None else [])]
    low, high = (math.floor(min(ends) / step) - 1) * step, (math.ceil(max(ends) / step) + 1) * step
    quantiles = (values[round(i / (COLUMNS - 1) * (len(values) - 1))] for i in range(COLUMNS))
    columns = {_on(q + step if i else q, step) for i, q in enumerate(quantiles)}
    if chosen is not None:
        columns.add(chosen)
    return Thresholds(
        "at_most" if key == "at_most" else "tau", metric, gate.get("direction") == "above", chosen,
        _on(low, step), _on(high, step), step, tuple(sorted(columns)),
        tuple((kind, tuple(lines)) for kind, lines in view.kinds().items()),
    )  # fmt: skip


def _step(least: float) -> float:
    """1, 2 or 5 times a power of ten, not below `least`: a τ that is short to write."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def _on(value: float, step: float) -> float:
    """The value on the slider's grid, as it is written."""
    return float(_plain(round(value / step) * step))


def drawn(choice: Thresholds, cells: Grid) -> str:
    """Module types by blocks; a square fills as its tensors merge. Marks carry their values for the script."""
    left, right, upper, height = 168.0, 84.0, 20.0, 22.0
    step = min(40.0, (1000.0 - left - right) / max(1, len(cells.blocks)))
    edge = left + step * len(cells.blocks)
    parts = []
    for column in range(0, len(cells.blocks), every(len(cells.blocks), 32)):
        parts.append(words(left + (column + 0.5) * step, upper - 7, cells.blocks[column], "t", "middle"))
    parts.append(words(edge + right - 6, upper - 7, "merged", "t", "end"))
    shown: set[str] = set()
    for index, (kind, row) in enumerate(cells.rows.items()):
        y = upper + index * height
        marks = [words(left - 8, y + 15, kind if len(kind) <= 26 else f"…{kind[-25:]}", "h", "end")]
        lines = [line for cell in row for line in cell.lines]
        shown.update(line.name for line in lines)
        room, side = step - min(1.0, step / 6), height - 1
        for cell in row:
            part, x = sum(line.merged for line in cell.lines) / len(cell.lines), left + cell.column * step
            square = tag("rect", x=x, y=y, width=room, height=side, class_="rest")
            square += tag("rect", x=x, y=y + side * (1 - part), width=room, height=side * part, class_="share")
            marks.append(f"<g {_data(choice, cell.lines)}>{square}</g>")
        told = f"{sum(line.merged for line in lines)} of {len(lines)}"
        marks.append(words(edge + right - 6, y + 15, told, "t sum", "end"))
        parts.append(tag("g", "".join(marks), class_="row"))
    rest = [line for _, lines in choice.rows for line in lines if line.name not in shown]
    if rest:
        parts.append(f'<g class="row"><g {_data(choice, rest)}></g></g>')
    few = len(cells.blocks) <= 16
    label = "Which blocks and module types merge at the chosen τ"
    high = upper + height * len(cells.rows)
    return drawing(edge + right, high, label, *parts, class_="few" if few else "wide", fixed=few)


def _data(choice: Thresholds, lines: Iterable[Line]) -> str:
    """Attributes for the script: values of the tensors that follow τ; of the others, how many merge; all of them."""
    every_line = list(lines)
    values = " ".join(repr(line.value) for line in every_line if choice.follows(line))
    settled = sum(line.merged for line in every_line if not choice.follows(line))
    return f'data-v="{values}" data-m="{settled}" data-n="{len(every_line)}"'
