"""The terminal's summary of a plan and of a finished run: plain data in, text on a rich console.

Fits 80 columns, needs no colour and no box drawing, and falls back to ASCII where the output cannot hold
more. Text from outside is never read as markup. Knows no engine; `overview` reads the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from safemerge_recipes.report.console import Page, cut
from safemerge_recipes.report.overview import Line, Overview, read_plan
from safemerge_recipes.report.sentences import chance, methods, sentence
from safemerge_recipes.report.terminal_scores import score_lines
from safemerge_recipes.text import (
    clean,
    count,
    duration,
    figure,
    fixed,
    median,
    number,
    percent,
    size,
    things,
)

if TYPE_CHECKING:
    from rich.console import Console

MAX_KINDS = 24
"""Module types listed one by one; what is beyond is summed up."""
CHART_ROWS = 9
AXIS = (12, 24)
"""Least and most columns of the small ρ axis beside each module type; names come first."""


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Prints what a plan decides, why, and what carrying it out will take."""
    page, view = Page(console), read_plan(plan)
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
            `peak_memory` (bytes), `resumed` (tensors that were there already), `scores`, `warnings` (what is not
            in the plan, such as licences that differ); each may be absent.
        console: where to print.
    """
    page, view = Page(console), read_plan(plan)
    _head(page, view, done=True)
    _body(page, view)
    score_lines(page, result.get("scores"))
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
    for warning in result.get("warnings") or ():
        page.line(f"Warning: {clean(warning, 1000)}", "yellow")
    if facts:
        page.line(("  " if result.get("output") else "Wrote ") + ", ".join(facts))


def _head(page: Page, view: Overview, done: bool) -> None:
    page.line(view.name, "bold")
    if view.description:
        page.line(clean(view.description, 600))
    page.line()
    page.line(sentence(view, done))
    if named := [label for label, _, _ in methods(view)]:
        page.line(f"Method: {'; '.join(named)}.")
    page.line()


def _body(page: Page, view: Overview) -> None:
    kinds = view.kinds()
    if kinds:
        _kinds(page, view, kinds)
        page.line()
    if view.measured and any(line.block is not None and line.rho is not None for line in view.gated):
        _chart(page, view)
        page.line()
    if told := chance(view):
        page.line(told, "yellow")
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


def _axis(lines: list[Line], top: float, columns: int) -> str:
    """min to max of ρ as a line, its median, τ and the median of ρ₀, on so many columns from 0 to `top`."""
    rhos = [line.rho for line in lines if line.rho is not None]
    cells = [" "] * columns

    def at(value: float) -> int:
        return max(0, min(columns - 1, round(value / top * (columns - 1))))

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


def _kinds(page: Page, view: Overview, kinds: Mapping[str, list[Line]]) -> None:
    """A line a module type: how many merge, and where ρ is measured its median and its spread on an axis.

    Names take what they need before the axis is drawn wide.
    """
    rows = list(kinds.items())
    listed, rest = rows[:MAX_KINDS], rows[MAX_KINDS:]
    wanted = max(len("module type"), *(len(kind) for kind, _ in listed))
    figures: list[tuple[str, Callable[[list[Line]], str]]] = [
        ("merge", lambda lines: str(sum(line.merged for line in lines))),
        ("gated", lambda lines: str(len(lines))),
    ]
    spread = any(line.rho_z is not None for line in view.gated)
    if view.measured:
        figures.append(("median", lambda lines: fixed(median([x for line in lines if (x := line.rho) is not None]))))
    if spread:
        figures.append(("    z", lambda rows: fixed(median([z for line in rows if (z := line.rho_z) is not None]), 1)))
    noisy = any(line.noise is not None for line in view.gated)
    if noisy:
        figures.append(
            ("noise", lambda rows: percent(median([x for line in rows if (x := line.noise) is not None]), 0))
        )
    room = page.width - sum(2 + len(head) for head, _ in figures)
    axis = max(AXIS[0], min(AXIS[1], room - 2 - wanted)) if view.measured else 0
    label, top = max(8, min(room - (2 + axis if axis else 0), wanted)), _top(view)

    def row(kind: str, lines: list[Line], drawn: bool = True) -> str:
        text = f"{cut(kind, label):<{label}}" + "".join(f"  {of(lines):>{len(head)}}" for head, of in figures)
        return f"{text}  {_axis(lines, top, axis)}" if axis and drawn else text

    head = f"{'module type':<{label}}" + "".join(f"  {head}" for head, _ in figures)
    page.line(head + (f"  0{figure(top, 2):>{axis - 1}}" if axis else ""), "dim")
    for kind, lines in listed:
        page.marks(row(kind, lines), {"●": "bold", "┊": "yellow", "×": "dim"})
    if rest:
        others = [line for _, members in rest for line in members]
        page.marks(row(f"{len(rest)} others", others), {"●": "bold"})
    if len(rows) > 1:
        page.line(row("all", view.gated, drawn=False), "bold")
    if free := len(view.lines) - len(view.gated):
        page.line(f"{'not gated':<{label}}  {'–':>5}  {free:>5}", "dim")
    if view.measured:
        page.line("ρ: ● median, ─ min to max, ┊ τ, × ρ₀ (an update unrelated to V)", "dim")
    if spread:
        page.line("z: median distance of ρ from ρ₀ in spreads; within ±2 chance does as well", "dim")
    if noisy:
        page.line("noise: part of ‖V‖ or ‖Δ‖ that quantisation makes; above 70 % ρ says little", "dim")


# By block


def _chart(page: Page, view: Overview) -> None:
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
