"""safemerge_report.html: one file that shows a plan, its scores and where everything came from.

Plain data in, text out. The page loads nothing: style and script are inside, pictures are inline SVG, and its
content policy allows no more. Without script everything is readable; script adds search, sorting and tips.
All text from outside is escaped by `svg.text` and `svg.tag`; none of it enters the script or the style.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from safemerge_recipes.report import charts
from safemerge_recipes.report.overview import (
    FORMULAS,
    Line,
    Overview,
    criteria,
    method_link,
    method_words,
    read_plan,
    sentence,
)
from safemerge_recipes.report.scores import interval, is_rate, read_scores, read_verdicts, shown
from safemerge_recipes.report.svg import drawing, tag, text
from safemerge_recipes.text import (
    clean_lines,
    duration,
    figure,
    fixed,
    grouped,
    median,
    number,
    size,
    things,
)

MAX_ROWS = 1500
"""Tensors in the table of decisions; the plan file has them all."""

_PAPER = "https://arxiv.org/abs/2503.17239"


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
            `comparisons` also the tests in words.
        provenance: `sources` by role, `versions`, `recipe` (YAML text), `created`, `timings` (seconds).
        pictures: further sections, title to SVG file text; shown as images, so that nothing in them runs.
    """
    view = read_plan(plan)
    origin = provenance if isinstance(provenance, Mapping) else {}
    cells = charts.grid(view)
    body = "\n".join(
        part
        for part in (
            _head(view, origin),
            _scores(scores),
            _by_block(view, cells),
            _heat(view, cells),
            _ratios(cells),
            _norms(cells),
            *(_picture(title, svg) for title, svg in (pictures or {}).items()),
            _kinds(view),
            _decisions(view),
            _provenance(origin),
        )
        if part
    )
    assets = files("safemerge_recipes.report") / "assets"
    style = (assets / "report.css").read_text(encoding="utf-8")
    script = (assets / "report.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'" + ("; img-src data:" if pictures else "")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(view.name)} · SafeMERGE report</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _section(name: str, title: str, note: str, *content: str) -> str:
    """A section with its heading; `note` is HTML of ours."""
    head = tag("h2", text(title), id=f"{name}-title")
    return tag(
        "section",
        head + (tag("p", note, class_="note") if note else "") + "".join(content),
        aria_labelledby=f"{name}-title",
    )


# Top of the page


def _head(view: Overview, origin: Mapping[str, Any]) -> str:
    gated = view.gated
    merged = sum(line.merged for line in gated)
    summary = view.summary
    facts = [("merged", grouped(merged), f"of {grouped(len(gated))} gated")]
    facts.append(("kept by the gate", grouped(len(gated) - merged), ""))
    facts.append(("not gated", grouped(len(view.lines) - len(gated)), ""))
    if number(summary.get("bytes_written")):
        facts.append(("written", size(summary["bytes_written"]), ""))
    if number(summary.get("peak_memory")):
        facts.append(("peak memory", size(summary["peak_memory"]), "projected"))
    shown_facts = "".join(
        tag(
            "div",
            tag("dt", text(label)) + tag("dd", text(value) + (" " + tag("small", text(more)) if more else "")),
        )
        for label, value, more in facts
    )
    parts = [tag("p", "SafeMERGE report", class_="eyebrow"), tag("h1", text(view.name))]
    if view.description:
        parts.append(tag("p", text(view.description, 2000)))
    parts.append(tag("p", text(sentence(view, True)), class_="lead"))
    parts.append(_method(view))
    parts.append(tag("dl", shown_facts, class_="facts"))
    if view.warnings:
        parts.append(
            tag(
                "ul",
                "".join(tag("li", text(warning, 1000)) for warning in view.warnings[:50]),
                class_="warnings",
            )
        )
    return tag("header", "".join(parts))


def _method(view: Overview) -> str:
    methods = view.methods()
    if not methods:
        return ""
    shown_methods = []
    for method in methods[:8]:
        label = method_words(view, method)
        link = method_link(method)
        name = tag("a", text(label), href=link, rel="noreferrer") if link else text(label)
        phrase = FORMULAS.get(method, "")
        shown_methods.append(name + (f" (the update becomes {text(phrase)})" if phrase else ""))
    return tag("p", f"Method: {'; '.join(shown_methods)}.", class_="note")


# Pictures


def _key(mark: str, label: str) -> str:
    return tag("li", drawing(32, 16, "", mark) + text(label))


_MERGED = '<circle cx="16" cy="8" r="6" class="m"/>'
_KEPT = '<circle cx="16" cy="8" r="6" class="k"/>'
_TAU = '<line x1="0" y1="8" x2="32" y2="8" class="tau"/>'
_NULL = '<line x1="0" y1="8" x2="32" y2="8" class="null"/>'


def _legend(*items: str) -> str:
    return tag("ul", "".join(items), class_="legend")


def _left_out(cells: charts.Grid) -> str:
    if not cells.left_out:
        return ""
    amount = text(things(cells.left_out, "tensor"))
    return f" {amount} in further blocks or module types are not drawn; the plan file has them."


def _by_block(view: Overview, cells: charts.Grid) -> str:
    drawn = charts.panels(cells)
    if not drawn:
        note = "No ρ was measured: the recipe names no base model, or its gate does not need one."
        return _section("rho", "ρ by block", note) if view.gated else ""
    rules = [text(words) for words in criteria(view.recipe)]
    note = (
        "ρ = cos(VVᵀΔf, Δf) tells how much of a tensor’s update Δf lies where alignment changed the weights "
        "(V = aligned − base). ρ₀ is what an update unrelated to V would show; it depends on shape and "
        "spectrum, so compare ρ with ρ₀ before comparing module types."
        + (f" Merged: {'; by rule: '.join(rules)}." if rules else "")
        + (
            " Where a block has several tensors of a type, the dot is their median, filled if at least half "
            "merge, on a line from the least to the greatest."
            if any(len(cell.lines) > 1 for row in cells.rows.values() for cell in row)
            else ""
        )
        + _left_out(cells)
    )
    keys = [_key(_MERGED, "merged"), _key(_KEPT, "kept")]
    if any(line.tau_rho is not None for line in view.gated):
        keys.append(_key(_TAU, "threshold τ"))
    if any(line.rho_null is not None for line in view.gated):
        keys.append(_key(_NULL, "ρ₀"))
    return _section("rho", "ρ by block", note, _legend(*keys), tag("div", "".join(drawn), class_="panels"))


def _heat(view: Overview, cells: charts.Grid) -> str:
    if not cells.rows:
        return ""
    keys = [_key(_MERGED, "merged")]
    if view.measured:
        keys.append(tag("li", charts.heat_scale(cells)))
    title = "ρ over the whole model" if view.measured else "Merged over the whole model"
    note = "Blocks from left to right." + _left_out(cells)
    return _section("heat", title, note, _legend(*keys), tag("div", charts.heat_map(cells), class_="scroll"))


def _ratios(cells: charts.Grid) -> str:
    drawn = charts.ratios(cells)
    if not drawn:
        return ""
    note = (
        "ρ divided by its null ρ₀: at 1 an update lies where alignment changed the weights just as much as "
        "an unrelated one would, below 1 less, above 1 more. Within a row the first block is at the top. The "
        "grey band is where the threshold lies."
    )
    keys = [_key(_MERGED, "merged"), _key(_KEPT, "kept"), _key(_NULL, "ρ = ρ₀")]
    return _section("ratio", "Against chance: ρ/ρ₀", note, _legend(*keys), drawn)


def _norms(cells: charts.Grid) -> str:
    drawn = charts.norms(cells)
    if not drawn:
        return ""
    note = (
        "How much fine-tuning moved each tensor (‖Δf‖) beside how much alignment had moved it (‖V‖). Both "
        "axes are logarithmic."
    )
    return _section("norms", "Norms", note, _legend(_key(_MERGED, "merged"), _key(_KEPT, "kept")), drawn)


# Tables


def _table(heads: Sequence[tuple[str, str]], rows: str, **attributes: object) -> str:
    top = "".join(tag("th", text(label), scope="col", class_=class_ or None) for label, class_ in heads)
    return tag("table", tag("thead", tag("tr", top)) + tag("tbody", rows), **attributes)


def _scores(scores: Mapping[str, Any] | None) -> str:
    groups = read_scores(scores)
    if not groups:
        return ""
    rows = []
    for label, members in groups.items():
        rate = is_rate(members)
        ends = [v for row in members for v in (row.value, row.low, row.high) if v is not None]
        low, high = (0.0, 1.0) if rate else (min(0.0, *ends), max(0.0, *ends))
        better = {True: "higher is better", False: "lower is better", None: ""}[members[0].higher_is_better]
        head = text(label) + (" " + tag("small", better) if better else "")
        rows.append(tag("tr", tag("th", head, scope="rowgroup", colspan=5), class_="first"))
        for row in members:
            rows.append(
                tag(
                    "tr",
                    tag("td", text(row.model), class_="model best" if row.model == "merged" else "model")
                    + tag("td", charts.score_bar(row, rate, low, high), class_="dots")
                    + tag("td", text(shown(row.value, rate)), class_="n")
                    + tag("td", text(interval(row, rate) or "–"), class_="n")
                    + tag("td", text("–" if row.n is None else grouped(row.n)), class_="n wide-only"),
                )
            )
    scale = "Lines are 95 % intervals; percentages are drawn from 0 to 100."
    heads = [("model", ""), ("", "dots"), ("value", "n"), ("95 % interval", "n"), ("examples", "n wide-only")]
    table = _table(heads, "".join(rows), class_="scores")
    return _section("scores", "Scores", scale, tag("div", table, class_="scroll"), _tests(scores))


def _tests(scores: Mapping[str, Any] | None) -> str:
    told = read_verdicts(scores, 60)
    if not told:
        return ""
    head = tag("p", "Tests are paired by prompt, with Holm's correction over all of them.", class_="note")
    return head + tag("ul", "".join(tag("li", text(one, 1000)) for one in told), class_="tests")


def _picture(title: str, svg: str) -> str:
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    name = re.sub(r"[^a-z]+", "-", title.lower())
    # Not `tag`, which cuts attributes short: base64 needs no escaping.
    return _section(name, title, "", f'<div class="scroll"><img alt="{text(title)}" src="{source}"></div>')


def _kinds(view: Overview) -> str:
    kinds = view.kinds()
    if not kinds:
        return ""
    rows = []
    for kind, lines in list(kinds.items())[: 4 * charts.MAX_KINDS]:
        rho = [line.rho for line in lines if line.rho is not None]
        null = median([line.rho_null for line in lines if line.rho_null is not None])
        merged = sum(line.merged for line in lines)
        part = merged / len(lines)
        bar = drawing(
            100, 10, f"{figure(100 * part)} %",
            tag("rect", x=0.0, y=2.0, width=100.0, height=6.0, class_="rest"),
            tag("rect", x=0.0, y=2.0, width=100 * part, height=6.0, class_="share"),
        )  # fmt: skip
        rows.append(
            tag(
                "tr",
                tag("th", text(kind), scope="row")
                + "".join(tag("td", text(grouped(n)), class_="n") for n in (merged, len(lines)))
                + tag("td", bar, class_="bar")
                + "".join(
                    tag("td", fixed(x), class_="n")
                    for x in (min(rho, default=None), median(rho), max(rho, default=None), null)
                    if view.measured
                ),
            )
        )
    heads = [("module type", ""), ("merged", "n"), ("gated", "n"), ("", "bar")]
    if view.measured:
        heads += [("ρ min", "n"), ("median", "n"), ("max", "n"), ("median ρ₀", "n")]
    more = len(kinds) - 4 * charts.MAX_KINDS
    note = f"{things(more, 'further module type')} in the plan file." if more > 0 else ""
    return _section("kinds", "By module type", note, tag("div", _table(heads, "".join(rows)), class_="scroll"))


def _decisions(view: Overview) -> str:
    lines = view.lines
    if not lines:
        return ""
    note = "Every tensor of the output, in checkpoint order, with the reason for what happens to it."
    if len(lines) > MAX_ROWS:
        # Gated tensors first: they are what one looks for.
        chosen = sorted(range(len(lines)), key=lambda i: (not lines[i].gated, i))[:MAX_ROWS]
        lines = tuple(lines[i] for i in sorted(chosen))
        note = (
            f"{text(things(len(lines), 'tensor'))} of {text(grouped(len(view.lines)))}, gated ones first "
            "to be listed; safemerge_plan.json holds them all."
        )
    figures = [("ρ", "n"), ("ρ₀", "n"), ("ρ/ρ₀", "n"), ("‖V‖", "n wide-only"), ("‖Δf‖", "n wide-only")]
    heads = [
        ("tensor", "name"),
        ("shape", "wide-only"),
        *(figures if view.measured else ()),
        ("decision", ""),
        ("reason", "why"),
    ]
    tools = (
        '<div class="tools" id="tools" hidden>'
        '<input type="search" placeholder="Search names and reasons" aria-label="Search">'
        '<select aria-label="Decision"><option value="">all decisions</option>'
        '<option value="m">merged</option><option value="k">kept by the gate</option>'
        '<option value="f">not gated</option></select><output aria-live="polite"></output></div>'
    )
    table = _table(heads, "\n".join(_row(line, view.measured) for line in lines), id="decisions")
    return _section("all", "Decisions", note, tools, tag("div", table, class_="scroll"))


def _row(line: Line, measured: bool) -> str:
    action = "m" if line.merged else "k" if line.gated else "f"
    label = {"m": "merge", "k": "keep", "f": "keep"}[action]
    class_ = {"m": "act merge", "k": "act", "f": "act free"}[action]
    taken = f" {line.source}" if line.source and line.source != "finetuned" else ""
    shape = "×".join(map(str, line.shape))
    figures = (
        f'<td class="n">{fixed(line.rho)}</td><td class="n">{fixed(line.rho_null)}</td>'
        f'<td class="n">{fixed(line.ratio, 2)}</td><td class="n wide-only">{figure(line.norm_v)}</td>'
        f'<td class="n wide-only">{figure(line.norm_delta)}</td>'
    )
    return (
        f'<tr data-a="{action}"><td class="code name">{text(line.name, 160)}</td>'
        f'<td class="wide-only shape">{text(shape)} {text(line.dtype)}</td>{figures if measured else ""}'
        f'<td class="{class_}">{label}{text(taken)}</td><td class="why">{text(line.reason, 200)}</td></tr>'
    )


# Where it came from


def _provenance(origin: Mapping[str, Any]) -> str:
    parts = []
    sources = origin.get("sources")
    if isinstance(sources, Mapping) and sources:
        rows = []
        for role, source in list(sources.items())[:20]:
            known = source if isinstance(source, Mapping) else {"label": source}
            cells = "".join(
                tag(
                    "td",
                    text(known.get(key) or "–", 300),
                    class_="code" if key in ("label", "revision") else None,
                )
                for key in ("label", "kind", "revision", "license")
            )
            rows.append(tag("tr", tag("th", text(role, 40), scope="row") + cells))
        heads = [("role", ""), ("source", ""), ("kind", ""), ("revision", ""), ("licence", "")]
        parts.append(tag("h3", "Sources") + tag("div", _table(heads, "".join(rows)), class_="scroll"))
    facts = []
    versions, timings = origin.get("versions"), origin.get("timings")
    if isinstance(versions, Mapping) and versions:
        facts.append(
            "Versions: " + ", ".join(f"{text(k, 60)} {text(v, 60)}" for k, v in list(versions.items())[:40]) + "."
        )
    if isinstance(timings, Mapping):
        known_times = [
            f"{text(k, 60)} {text(duration(v))}" for k, v in list(timings.items())[:40] if number(v) is not None
        ]
        if known_times:
            facts.append("Time: " + ", ".join(known_times) + ".")
    if origin.get("created"):
        facts.append(f"Made {text(origin['created'], 60)}.")
    parts += [tag("p", fact, class_="note") for fact in facts]
    if origin.get("recipe"):
        recipe = tag("pre", tag("code", escape(clean_lines(origin["recipe"]))), tabindex=0)
        parts.append(tag("h3", "Recipe") + recipe)
        parts.append(tag("p", "To repeat it: <code>safemerge-run safemerge_recipe.yaml</code>", class_="note"))
    footer = tag(
        "footer",
        "Made with safemerge-recipes. Method: "
        + tag("a", "SafeMERGE, arXiv 2503.17239", href=_PAPER, rel="noreferrer")
        + ".",
    )
    return (_section("origin", "Provenance", "", *parts) if parts else "") + footer
