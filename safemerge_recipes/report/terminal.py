"""The terminal's summary of a plan and of a finished run: plain data in, text on a rich console.

Fits 80 columns, needs no colour and no box drawing, and falls back to ASCII where the output cannot hold
more. Text from outside is never read as markup. Knows no engine; `overview` reads the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safemerge_recipes.report.overview import Line, Overview, method_words, read_plan, sentence
from safemerge_recipes.report.scores import interval, is_rate, read_scores, shown
from safemerge_recipes.text import (
    clean,
    count,
    duration,
    figure,
    fixed,
    median,
    number,
    size,
    things,
)

if TYPE_CHECKING:
    from rich.console import Console

MAX_WIDTH = 100
MAX_KINDS = 24
"""Module types listed one by one; what is beyond is summed up."""
CHART_ROWS = 9
AXIS = 24
"""Columns of the small ρ axis beside each module type."""

_ASCII = str.maketrans(
    {
        "ρ": "rho", "₀": "0", "τ": "tau", "α": "alpha", "Δ": "D", "λ": "lambda", "γ": "gamma", "‖": "|",
        "−": "-", "–": "-", "…": "...", "≤": "<=", "≥": ">=", "●": "o", "│": "|", "─": "-", "┊": "!",
        "×": "x", "┄": "-", "\N{NO-BREAK SPACE}": " ",
    }
)  # fmt: skip


class _Page:
    """Lines on a console: `words` are ours and may be styled, everything is literal text."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = max(40, min(console.width, MAX_WIDTH))
        self.plain = console.options.ascii_only

    def line(self, text: str = "", style: str = "") -> None:
        """One paragraph, wrapped to the page."""
        from rich.text import Text

        self.console.print(Text(self.fit(text), style=style, overflow="fold"), width=self.width, highlight=False)

    def marks(self, text: str, styles: Mapping[str, str]) -> None:
        """One line of a chart, each mark in its style."""
        from rich.text import Text

        line = Text(self.fit(text), no_wrap=True, overflow="crop")
        for mark, style in styles.items():
            line.highlight_words([self.fit(mark)], style)
        self.console.print(line, width=self.width, highlight=False)

    def fit(self, text: str) -> str:
        """The text in characters that the output can hold."""
        if not self.plain:
            return text
        return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Prints what a plan decides, why, and what carrying it out will take."""
    page, view = _Page(console), read_plan(plan)
    _head(page, view, done=False)
    _body(page, view)
    summary = view.summary
    projected = [
        f"{word} {size(summary[key])}"
        for key, word in (("bytes_read", "read"), ("bytes_written", "write"), ("peak_memory", "peak memory"))
        if number(summary.get(key))
    ]
    if projected:
        page.line("Projected: " + ", ".join(projected) + ".")


def print_result(plan: Mapping[str, Any], result: Mapping[str, Any], console: Console) -> None:
    """Prints a finished run: the plan's decisions, then the run's own figures and scores.

    Args:
        plan: the content of safemerge_plan.json.
        result: `output` (folder), `bytes_written` (bytes), `seconds` or `timings` with a `total`,
            `peak_memory` (bytes), `resumed` (tensors that were there already), `scores`; each may be absent.
        console: where to print.
    """
    page, view = _Page(console), read_plan(plan)
    _head(page, view, done=True)
    _body(page, view)
    _scores(page, result.get("scores"))
    timings = result.get("timings")
    seconds = number(result.get("seconds", timings.get("total") if isinstance(timings, Mapping) else None))
    written = number(result.get("bytes_written", view.summary.get("bytes_written")))
    facts = [size(written)] if written is not None else []
    if seconds is not None:
        facts.append(duration(seconds))
    if number(result.get("peak_memory")):
        facts.append(f"peak memory {size(result['peak_memory'])}")
    if count(result.get("resumed")):
        facts.append(f"{things(count(result['resumed']), 'tensor')} from an earlier run")
    if result.get("output"):
        page.line(f"Wrote {clean(result['output'], 1000)}", "bold")
    if facts:
        page.line(("  " if result.get("output") else "Wrote ") + ", ".join(facts))


def _head(page: _Page, view: Overview, done: bool) -> None:
    page.line(view.name, "bold")
    if view.description:
        page.line(clean(view.description, 600))
    page.line()
    page.line(sentence(view, done))
    methods = view.methods()
    if methods:
        page.line("Method: " + "; ".join(method_words(view, method) for method in methods[:8]) + ".")
    page.line()


def _body(page: _Page, view: Overview) -> None:
    kinds = view.kinds()
    if kinds:
        _kinds(page, view, kinds)
        page.line()
    if view.measured and any(line.block is not None and line.rho is not None for line in view.gated):
        _chart(page, view)
        page.line()
    for text in view.warnings[:10]:
        page.line(f"Warning: {text}", "yellow")
    if len(view.warnings) > 10:
        page.line(f"and {len(view.warnings) - 10} further warnings, in the plan file.", "yellow")
    if view.warnings:
        page.line()


# By module type


def _top(view: Overview) -> float:
    """The end of the ρ axis: a number whose quarters read well, not below anything that is drawn."""
    drawn = [x for line in view.gated for x in (line.rho, line.tau_rho, line.rho_null) if x is not None]
    most = max(drawn, default=1.0)
    return next((top for top in (0.04, 0.08, 0.2, 0.4, 0.6, 0.8, 1.0) if top >= most), most)


def _axis(lines: list[Line], top: float) -> str:
    """min to max of ρ as a line, its median, τ and the median of ρ₀, on `AXIS` columns from 0 to `top`."""
    rhos = [line.rho for line in lines if line.rho is not None]
    cells = [" "] * AXIS

    def at(value: float) -> int:
        return max(0, min(AXIS - 1, round(value / top * (AXIS - 1))))

    if rhos:
        for column in range(at(min(rhos)), at(max(rhos)) + 1):
            cells[column] = "─"
    for tau in {line.tau_rho for line in lines if line.tau_rho is not None}:
        cells[at(tau)] = "┊"
    null = median([line.rho_null for line in lines if line.rho_null is not None])
    if null is not None:
        cells[at(null)] = "×"
    middle = median(rhos)
    if middle is not None:
        cells[at(middle)] = "●"
    return "".join(cells)


def _kinds(page: _Page, view: Overview, kinds: Mapping[str, list[Line]]) -> None:
    rows = list(kinds.items())
    shown_rows, rest = rows[:MAX_KINDS], rows[MAX_KINDS:]
    measured, top = view.measured, _top(view)
    # The figures beside the name take 19 columns, with ρ another 8 + AXIS + 2.
    room = page.width - 19 - (10 + AXIS if measured else 0)
    label = max(8, min(room, max(len("module type"), *(len(kind) for kind, _ in shown_rows))))
    head = f"{'module type':<{label}}  merge  gated"
    if measured:
        head += f"  median  0{figure(top, 2):>{AXIS - 1}}"
    page.line(head, "dim")
    for kind, lines in shown_rows:
        page.marks(_row(_cut(kind, label), lines, label, measured, top), {"●": "bold", "┊": "yellow", "×": "dim"})
    if rest:
        lines = [line for _, members in rest for line in members]
        page.marks(_row(f"{len(rest)} others", lines, label, measured, top), {"●": "bold"})
    if len(rows) > 1:
        page.line(_row("all", view.gated, label, False, top).rstrip(), "bold")
    free = len(view.lines) - len(view.gated)
    if free:
        page.line(f"{'not gated':<{label}}  {'–':>5}  {free:>5}", "dim")
    if measured:
        page.line("ρ: ● median, ─ min to max, ┊ τ, × ρ₀ (an update unrelated to V)", "dim")


def _row(kind: str, lines: list[Line], label: int, measured: bool, top: float) -> str:
    text = f"{kind:<{label}}  {sum(line.merged for line in lines):>5}  {len(lines):>5}"
    if not measured:
        return text
    middle = median([line.rho for line in lines if line.rho is not None])
    return f"{text}  {fixed(middle):>6}  {_axis(lines, top)}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[len(text) - width + 1 :]}"


# By block


def _chart(page: _Page, view: Overview) -> None:
    """Per block: ρ from min to max with its median; τ dotted. Blocks share columns where they must."""
    gated = [line for line in view.gated if line.block is not None and line.rho is not None]
    total = len(view.blocks)
    room = page.width - 8
    columns = min(total, room)
    wide = max(1, min(3, room // columns))  # characters to a column
    members: list[list[Line]] = [[] for _ in range(columns)]
    for line in gated:
        members[(line.block or 0) * columns // total].append(line)
    top = _top(view)

    def at(value: float) -> int:
        return max(0, min(CHART_ROWS - 1, round(value / top * (CHART_ROWS - 1))))

    grid = [[" "] * columns for _ in range(CHART_ROWS)]
    for tau in {line.tau_rho for line in gated if line.tau_rho is not None and line.metric == "rho"}:
        grid[at(tau)] = ["┄"] * columns
    for column, lines in enumerate(members):
        rhos = [line.rho for line in lines if line.rho is not None]
        if not rhos:
            continue
        for row in range(at(min(rhos)), at(max(rhos)) + 1):
            grid[row][column] = "│"
        grid[at(median(rhos) or 0.0)][column] = "●"
    dashes = {at(t) for line in gated if (t := line.tau_rho) is not None and line.metric == "rho"}
    page.line("ρ by block: ● median, │ min to max" + (", ┄ τ" if dashes else ""), "dim")
    for row in reversed(range(CHART_ROWS)):
        mark = fixed(row * top / (CHART_ROWS - 1), 2) if row % 2 == 0 else ""
        cells = "".join(cell.ljust(wide, "┄" if row in dashes else " ") for cell in grid[row])
        page.marks(f"{mark:>5} {cells}".rstrip(), {"●": "bold", "┄": "yellow"})
    first, last = clean(view.blocks[0], 12), clean(view.blocks[-1], 12)
    gap = max(1, (columns - 1) * wide + 1 - len(first))
    page.line("      " + (first if total == 1 else f"{first}{last:>{gap}}"), "dim")


# Scores


def _scores(page: _Page, scores: object) -> None:
    """One line a model and metric: the value and its 95 % interval."""
    groups = read_scores(scores if isinstance(scores, Mapping) else None)
    if not groups:
        return
    width = max(10, *(len(row.model) for rows in groups.values() for row in rows))
    width = min(width, page.width - 40)
    for label, rows in groups.items():
        rate = is_rate(rows)
        page.line(label, "bold")
        for row in rows:
            between = interval(row, rate)
            text = f"  {_cut(row.model, width):<{width}}  {shown(row.value, rate):>8}"
            text += f"  {between:<14}" if between else " " * 16
            page.line((text + (f"  n = {count(row.n)}" if row.n is not None else "")).rstrip())
    page.line("Intervals are 95 %.", "dim")
    page.line()
