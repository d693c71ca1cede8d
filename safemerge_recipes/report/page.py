"""safemerge_report.html: one file that shows a plan, its scores and where everything came from.

Plain data in, text out, through the template `assets/report.html`. The page loads nothing: style and script are
inside, pictures are inline SVG, and its content policy allows no more. Without script everything is readable;
script adds the τ slider, search, sorting and tips. All text from outside is cleaned and escaped by the template's
environment; none of it enters the script or the style.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from safemerge_recipes.report import charts, scores, sentences
from safemerge_recipes.report.licences import licence_note
from safemerge_recipes.report.overview import Line, Overview, read_plan
from safemerge_recipes.report.scores import Score
from safemerge_recipes.report.svg import drawing, tag
from safemerge_recipes.report.thresholds import drawn, thresholds
from safemerge_recipes.text import (
    clean,
    clean_lines,
    duration,
    figure,
    fixed,
    grouped,
    median,
    number,
    percent,
    size,
    things,
)

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_ROWS = 1500
"""Tensors in the table of decisions; the plan file has them all."""
MAX_KINDS = 4 * charts.MAX_KINDS
"""Module types in the tables."""
MAX_TESTS = 60
"""Tests in the table."""


def render_report(
    plan: Mapping[str, Any],
    *,
    scores: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The report as one HTML document.

    Args:
        plan: the content of safemerge_plan.json.
        scores: `{"models": {model: {task: {metric: {"value", "low", "high", "n"}}}}}`, 95 % intervals; with
            `comparisons` also the paired tests.
        provenance: `sources` by role, `versions`, `recipe` (YAML text), `created`, `timings` (seconds).
        pictures: further sections, title to SVG file text; shown as images, so that nothing in them runs.
    """
    view = read_plan(plan)
    cells, choice = charts.grid(view), thresholds(view)
    from markupsafe import Markup

    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'" + ("; img-src data:" if pictures else "")
    )
    return _environment().get_template("report.html").render(
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        view=view,
        facts=_facts(view),
        scores=_score_groups(scores),
        cells=cells,
        choice=choice,
        choice_drawn=Markup(drawn(choice, cells)) if choice else "",
        panels=[Markup(panel) for panel in charts.panels(cells)],
        heat=Markup(charts.heat_map(cells)) if cells.rows else "",
        heat_scale=Markup(charts.heat_scale(cells)),
        ratios=Markup(charts.ratios(cells)),
        norms=Markup(charts.norms(cells)),
        several=any(len(cell.lines) > 1 for row in cells.rows.values() for cell in row),
        pictures=_pictures(pictures or {}),
        kinds=_kinds(view),
        decisions=_decisions(view),
        spread=any(line.rho_z is not None for line in view.gated),
        **_tests(scores),
        **_origin(provenance if isinstance(provenance, Mapping) else {}),
    )  # fmt: skip


@cache  # compiling the template takes longer than all else of a small run, and whoever plans many makes many pages
def _environment() -> Environment:
    """Strict and escaping: a name that is missing is an error, and text from outside is cleaned on its way in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("safemerge_recipes.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: (
            clean(value, 2000) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # folding constants costs a quarter of compiling, and a page is rendered once
    )
    environment.filters.update(
        fixed=fixed, figure=figure, grouped=grouped, things=things, percent=percent, part=clean, size=size
    )
    environment.globals.update(
        headline=scores.headline, shown=scores.shown, interval=scores.interval, task_title=scores.task_title,
        sentence=sentences.sentence, chance=sentences.chance, criteria=sentences.criteria,
        symbol=sentences.symbol, methods=sentences.methods, mark=_mark, licence_note=licence_note,
    )  # fmt: skip
    return environment


def _asset(name: str) -> str:
    return (files("safemerge_recipes.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _mark(kind: str) -> Any:
    """The sign of a legend."""
    from markupsafe import Markup

    drawn = {
        "merged": tag("circle", cx=16.0, cy=8.0, r=6.0, class_="m"),
        "kept": tag("circle", cx=16.0, cy=8.0, r=6.0, class_="k"),
        "tau": tag("line", x1=0.0, y1=8.0, x2=32.0, y2=8.0, class_="tau"),
        "null": tag("line", x1=0.0, y1=8.0, x2=32.0, y2=8.0, class_="null"),
    }
    return Markup(drawing(32, 16, "", drawn[kind]))


def _facts(view: Overview) -> list[tuple[str, str, str]]:
    gated, summary = view.gated, view.summary
    merged = sum(line.merged for line in gated)
    facts = [
        ("merged", grouped(merged), f"of {grouped(len(gated))} gated"),
        ("kept by the gate", grouped(len(gated) - merged), ""),
        ("not gated", grouped(len(view.lines) - len(gated)), ""),
    ]
    if number(summary.get("bytes_written")):
        facts.append(("written", size(summary["bytes_written"]), ""))
    if number(summary.get("peak_memory")):
        facts.append(("peak memory", size(summary["peak_memory"]), "projected"))
    return facts


def _score_groups(given: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Tasks and metrics with a row a model; those that only complete another come last, behind a fold."""
    from markupsafe import Markup

    found = []
    for label, members in scores.read_scores(given).items():
        rate = scores.is_rate(members)
        ends = [v for row in members for v in (row.value, row.low, row.high) if v is not None]
        low, high = (0.0, 1.0) if rate else (min(0.0, *ends), max(0.0, *ends))
        better = {True: "higher is better", False: "lower is better", None: ""}[members[0].higher_is_better]
        rows: list[tuple[Score, Any]] = [(row, Markup(charts.score_bar(row, rate, low, high))) for row in members]
        folded = scores.is_secondary(members[0].metric)
        found.append({"label": label, "better": better, "rate": rate, "rows": rows, "folded": folded})
    return found


def _tests(given: Mapping[str, Any] | None) -> dict[str, Any]:
    tests = scores.read_tests(given)
    more = len(tests) - MAX_TESTS
    return {
        "verdict": scores.headline(given),
        "separated": scores.separations(given),
        "tests": tests[:MAX_TESTS],
        "more_tests": more if more > 0 else 0,
        "cautions": scores.read_cautions(given)[:MAX_TESTS],
    }


def _pictures(given: Mapping[str, str]) -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [
        {
            "title": title,
            "name": re.sub(r"[^a-z]+", "-", title.lower()),
            "source": Markup(f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"),
        }
        for title, svg in given.items()
    ]


def _kinds(view: Overview) -> dict[str, Any]:
    from markupsafe import Markup

    kinds = view.kinds()
    rows = []
    for kind, lines in list(kinds.items())[:MAX_KINDS]:
        rho = [line.rho for line in lines if line.rho is not None]
        null = median([line.rho_null for line in lines if line.rho_null is not None])
        merged = sum(line.merged for line in lines)
        part = merged / len(lines)
        bar = drawing(
            100, 10, percent(part, None),
            tag("rect", x=0.0, y=2.0, width=100.0, height=6.0, class_="rest"),
            tag("rect", x=0.0, y=2.0, width=100 * part, height=6.0, class_="share"),
        )  # fmt: skip
        z = median([line.rho_z for line in lines if line.rho_z is not None])
        spread = (min(rho, default=None), median(rho), max(rho, default=None), null)
        rows.append({"kind": kind, "merged": merged, "gated": len(lines), "bar": Markup(bar), "rho": spread, "z": z})
    return {"rows": rows, "more": max(0, len(kinds) - MAX_KINDS)}


def _decisions(view: Overview) -> Sequence[Line]:
    """The tensors that are listed: all, or so many, gated ones first, as they are what one looks for."""
    lines = view.lines
    if len(lines) <= MAX_ROWS:
        return lines
    chosen = sorted(range(len(lines)), key=lambda i: (not lines[i].gated, i))[:MAX_ROWS]
    return tuple(lines[i] for i in sorted(chosen))


def _origin(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Sources, versions and times as far as they are known."""
    from markupsafe import escape

    given, versions, timings = origin.get("sources"), origin.get("versions"), origin.get("timings")
    sources = {
        str(role): source if isinstance(source, Mapping) else {"label": source}
        for role, source in (list(given.items())[:20] if isinstance(given, Mapping) else ())
    }
    versions = dict(list(versions.items())[:40]) if isinstance(versions, Mapping) else {}
    timings = list(timings.items())[:40] if isinstance(timings, Mapping) else []
    return {
        "sources": sources,
        "source_heads": [
            h for h in ("label", "kind", "revision", "license") if any(s.get(h) for s in sources.values())
        ],
        "versions": versions,
        "timings": [(name, duration(value)) for name, value in timings if number(value) is not None],
        "created": origin.get("created"),
        "recipe": escape(clean_lines(origin["recipe"])) if origin.get("recipe") else "",  # with its line breaks
    }
