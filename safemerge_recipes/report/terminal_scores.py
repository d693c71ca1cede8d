"""The terminal's tables of scores and tests, of a sweep and of a probe: plain data in, text on a rich console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safemerge_recipes.report.console import Page, cut
from safemerge_recipes.report.scores import (
    Test,
    headline,
    interval,
    is_rate,
    is_secondary,
    read_cautions,
    read_scores,
    read_tests,
    separations,
    shown,
    task_title,
)
from safemerge_recipes.text import clean, count, fixed, percent, points, signed, things

if TYPE_CHECKING:
    from rich.console import Console

SOURCES = ("finetuned", "aligned")
"""Models that a sweep shows beside its choice."""
SHOWN_GROUPS = 40
"""Rows of a probe; those in the middle are left out."""


def print_scores(content: Mapping[str, Any], console: Console) -> None:
    """Prints the headline, every task and metric with a line a model, and the paired tests."""
    page = Page(console)
    score_lines(page, content)


def score_lines(page: Page, scores: object) -> None:
    """Scores and tests of a scores file. Metrics that only complete another are left to the report."""
    content = scores if isinstance(scores, Mapping) else None
    groups = {label: rows for label, rows in read_scores(content).items() if not is_secondary(rows[0].metric)}
    if verdict := headline(content):
        page.line(f"{verdict}.", "bold")
    for told in separations(content):
        page.line(f"{told}.")
    if verdict:
        page.line()
    if groups:
        width = max(10, *(len(row.model) for rows in groups.values() for row in rows))
        width = min(width, page.width - 40)
        for label, rows in groups.items():
            rate = is_rate(rows)
            page.line(label, "bold")
            for row in rows:
                between = interval(row, rate)
                text = f"  {cut(row.model, width):<{width}}  {shown(row.value, rate):>8}"
                text += f"  {between:<14}" if between else " " * 16
                page.line((text + (f"  n = {count(row.n)}" if row.n is not None else "")).rstrip())
        page.line("Intervals are 95 %.", "dim")
        page.line()
    _tests(page, [test for test in read_tests(content) if not test.secondary])
    for caution in read_cautions(content):
        page.line(f"Mind: {caution}", "yellow")


def _tests(page: Page, tests: list[Test]) -> None:
    """One line a test, under the two models that it compares."""
    pair: tuple[str, ...] = ()
    for test in tests:
        if pair != (test.model, test.reference):
            pair = (test.model, test.reference)
            page.line(f"{test.model} against {test.reference}, paired by prompt, p after Holm", "bold")
        if test.difference is None:
            page.line(f"  {test.task}, {test.metric}: {test.verdict}")
            continue
        between = f"{test.between:<15}  " if page.width >= 76 else ""
        figures = f"{test.change:>6}  {between}p {test.chance:>7}  {test.finding}"
        room = min(30, max(12, page.width - len(figures) - 4))
        name = f"{task_title(test.task)}: {test.metric}"
        page.line(f"  {name if len(name) <= room else name[: room - 1] + '…':<{room}}  {figures}")
    if tests:
        page.line()


def print_sweep(content: Mapping[str, Any], console: Console) -> None:
    """Prints the points, the chosen one on the test split, and how many of its controls reach it."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False)
    rows = content["tuning"]["models"]
    metrics = dict.fromkeys((task, m) for tasks in rows.values() for task in tasks for m in tasks[task])
    kept = [(task, m) for task, m in metrics if not is_secondary(m)]
    grid.add_column("tuning split")
    grid.add_column("merged", justify="right")
    for task, metric in kept:
        name = task.removeprefix("safemerge_").removesuffix("_tuning")
        grid.add_column(metric if metric == "separation" else f"{name} {metric}", justify="right")
    chosen = content["chosen"]["label"]
    for label, tasks in rows.items():
        cells = [percent(tasks[task].get(metric, {}).get("value")) for task, metric in kept]
        merged = content["merged"].get(label)
        grid.add_row(
            label + (" ←" if label == chosen else ""),
            "" if merged is None else f"{merged} of {content['gated']}",
            *cells,
        )
    console.print(grid, markup=False)
    page = Page(console)
    page.line()
    page.line("Test split, 95 % intervals:")
    shown_models = {label: one for label, one in content["test"]["models"].items() if label in (*SOURCES, chosen)}
    score_lines(page, {"models": shown_models, "comparisons": content["verdicts"]})
    for one in content["control_tests"]:
        low, high = one["draws"][0], one["draws"][-1]
        page.line(
            f"{one['quantity']}: {one['reached']} of {len(one['draws'])} {one['control']} draws of as many tensors "
            f"({percent(low)} to {percent(high)}) reach its {percent(one['value'])}, one-sided exact "
            f"p = {fixed(one['p'])}"
        )


def print_recipes(content: Mapping[str, Any], console: Console) -> None:
    """Prints recipes of one family beside the models they start from, and how many of their controls reach them."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False)
    grid.add_column("test split")
    for name in ("merged", content["safety"], "utility"):
        grid.add_column(clean(name, 40), justify="right")
    for label, pair in content["values"].items():
        one = content["recipes"].get(label)
        merged = "" if one is None else f"{one['merged']} of {one['gated']}"
        grid.add_row(clean(label, 40), merged, percent(pair["safety"]), percent(pair["utility"]))
    console.print(grid, markup=False)
    page = Page(console)
    page.line()
    for label, tests in content["control_tests"].items():
        for one in tests:
            page.line(
                f"{label}, {one['quantity']}: {one['reached']} of {len(one['draws'])} {one['control']} draws of as "
                f"many tensors reach its {percent(one['value'])}, one-sided exact p = {fixed(one['p'])}"
            )
    score_lines(page, {"models": {}, "comparisons": content["verdicts"]})


def print_probe(content: Mapping[str, Any], console: Console) -> None:
    """Prints the groups from the largest gain in safety to the largest loss, and the correlations."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False)
    symbols = {"rho": "ρ", "rho_ratio": "ρ/ρ₀", "v_norm": "‖V‖"}
    for heading in ("merged alone", *symbols.values(), "refusal", "utility"):
        grid.add_column(heading, justify="left" if heading == "merged alone" else "right")
    rows = sorted(content["groups"].items(), key=lambda item: (-item[1]["safety"], item[0]))
    half = SHOWN_GROUPS // 2
    for name, row in rows if len(rows) <= SHOWN_GROUPS else [*rows[:half], *rows[-half:]]:
        grid.add_row(name, *(fixed(row[key]) for key in symbols), points(row["safety"]), points(row["utility"]))
    console.print(grid, markup=False)
    base, page = content["merge_none"], Page(console)
    left = len(rows) - SHOWN_GROUPS
    if left > 0:
        page.line(f"{things(left, 'group')} in between not shown.", "dim")
    page.line(
        f"Changes in points, from {clean(content.get('safety', 'refusal'), 40)} {percent(base['safety'])} "
        f"and utility {percent(base['utility'])} with none merged."
    )
    for one in content["correlations"]:
        name = clean(symbols.get(one["metric"], one["metric"]), 40)
        if one["spearman"] is None:
            page.line(f"{name} and {one['change']}: no correlation to compute (n = {one['n']})")
        else:
            page.line(
                f"{name} and {one['change']}: Spearman {signed(one['spearman'])}, p = {fixed(one['p'])}, n = {one['n']}"
            )
