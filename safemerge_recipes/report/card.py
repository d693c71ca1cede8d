"""README.md of a result: a model card with Hugging Face metadata. Plain data in, Markdown out.

The metadata is built and checked with huggingface_hub, offline. Outside text is escaped for Markdown
and HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from safemerge_recipes.report.overview import (
    FORMULAS,
    Overview,
    method_link,
    method_words,
    read_plan,
    sentence,
)
from safemerge_recipes.report.scores import Score, interval, is_rate, read_scores, read_verdicts, shown
from safemerge_recipes.text import clean, fixed, grouped, median, things

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENSES = frozenset(
    [
        "afl-3.0",
        "agpl-3.0",
        "apache-2.0",
        "artistic-2.0",
        "bigscience-bloom-rail-1.0",
        "bigscience-openrail-m",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc",
        "cc-by-2.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "creativeml-openrail-m",
        "deepfloyd-if-license",
        "ecl-2.0",
        "epl-2.0",
        "eupl-1.1",
        "gemma",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "isc",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "mit",
        "mpl-2.0",
        "ms-pl",
        "odbl",
        "odc-by",
        "openrail",
        "openrail++",
        "osl-3.0",
        "pddl",
        "unlicense",
        "wtfpl",
        "zlib",
    ]
)
"""Identifiers that the hub accepts as `license`; any other is `other` with a `license_name`."""
_LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_MARKUP = re.compile(r"[\\`*{}\[\]<>|~$&@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What Markdown, HTML, tables, mathematics, mentions or automatic links could read as markup in a line."""
_LINE_START = re.compile(r"[-+=#:]|[0-9]+(?=[.)](\s|$))")

_PAPER = "https://arxiv.org/abs/2503.17239"
MAX_KINDS = 60


def render_card(
    plan: Mapping[str, Any], *, scores: Mapping[str, Any] | None, provenance: Mapping[str, Any] | None
) -> str:
    """The model card; see `html.render_report` for the arguments.

    Raises:
        ValueError: huggingface_hub does not accept the metadata.
    """
    view = read_plan(plan)
    origin = provenance if isinstance(provenance, Mapping) else {}
    sources = _sources(view, origin)
    groups = read_scores(scores)
    body = "\n\n".join(
        part
        for part in (
            f"# {markdown(view.name)}",
            markdown(view.description, 2000),
            _what(view, sources),
            _source_table(sources),
            "\n".join(f"> **Mind:** {markdown(one, 1000)}" for one in view.warnings[:10]),
            _plan_table(view),
            _score_table(groups),
            "\n".join(f"- {markdown(one, 1000)}" for one in read_verdicts(scores, 60)),
            _repeat(origin),
        )
        if part
    )
    return f"---\n{_metadata(view, sources, groups)}\n---\n\n{body}\n"


def markdown(value: object, limit: int = 300) -> str:
    """Outside text, to be read literally in a Markdown paragraph, heading or table cell."""
    told = _MARKUP.sub(_entity, clean(value, limit).strip())
    start = _LINE_START.match(told)
    if start is None:
        return told
    # What would begin a list, a heading or a rule; a number keeps its digits.
    mark = f"{start[0]}\\" if start[0].isdigit() else _entity(start)
    return mark + told[start.end() :]


def _entity(found: re.Match[str]) -> str:
    named = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return named.get(found[0]) or f"&#{ord(found[0])};"


def code(value: object, limit: int = 300) -> str:
    """Outside text as code, in a table cell too: no character of it ends the code or the cell."""
    return f"<code>{_MARKUP.sub(_entity, clean(value, limit))}</code>"


# Metadata


def _sources(view: Overview, origin: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Sources by role: as recorded, else as the recipe names them."""
    given = origin.get("sources")
    if not isinstance(given, Mapping) or not given:
        given = view.recipe.get("sources")
    found: dict[str, Mapping[str, Any]] = {}
    for role, source in given.items() if isinstance(given, Mapping) else ():
        if isinstance(source, Mapping):
            known = dict(source)
            known.setdefault(
                "label", next((source[k] for k in ("model", "adapter", "location") if source.get(k)), None)
            )
            known.setdefault("kind", "adapter" if source.get("adapter") else None)
        else:
            known = {"label": source}
        if known.get("label"):
            found[clean(role, 40)] = known
    return found


def hub_id(source: Mapping[str, Any]) -> str | None:
    """The hub id a source names, without its revision; None for a folder, which has no revision."""
    name, _, pinned = str(source.get("label") or "").partition("@")
    if not (source.get("revision") or pinned):
        return None
    return name if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name else None


def _license(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Metadata of the licence that all sources share; empty if any is unknown or differs."""
    found = {str(source.get("license") or "").lower() for source in sources.values()}
    only = found.pop() if len(found) == 1 else ""
    if only in _LICENSES:
        return {"license": only}
    named = _LICENSE_NAME.fullmatch(only) and only not in ("other", "unknown")
    return {"license": "other", "license_name": only} if named else {}


def _metadata(view: Overview, sources: Mapping[str, Mapping[str, Any]], groups: Mapping[str, list[Score]]) -> str:
    from huggingface_hub.repocard_data import EvalResult, ModelCardData  # not all of the hub's client

    bases = list(dict.fromkeys(name for source in sources.values() if (name := hub_id(source))))
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.task,
            dataset_name=row.task,
            metric_type=row.metric.partition(",")[0],
            metric_name=row.label.partition(": ")[2],
            metric_value=row.value,
        )
        for rows in groups.values()
        for row in rows
        if row.model == "merged"
    ]
    more: dict[str, Any] = {"base_model_relation": "merge"} if bases else {}
    data = ModelCardData(
        base_model=bases or None,
        library_name="transformers",
        tags=["merge", "safemerge"],
        model_name=view.name if results else None,
        eval_results=results or None,
        **_license(sources),
        **more,
    )
    text = data.to_yaml()
    ModelCardData(**yaml.safe_load(text))  # what we publish is what the hub will read
    return text


# Body


def _what(view: Overview, sources: Mapping[str, Mapping[str, Any]]) -> str:
    """What this is, and by which method."""
    methods = []
    for method in view.methods():
        label, link = method_words(view, method), method_link(method)
        name = f"[{markdown(label)}]({link})" if link else markdown(label)
        phrase = FORMULAS.get(method)
        methods.append(name + (f", where the update becomes {markdown(phrase)}" if phrase else ""))
    told = f"A layer-gated merge after [SafeMERGE]({_PAPER}): {markdown(sentence(view, True), 2000)}"
    symbols = (
        "ρ = cos(VVᵀΔf, Δf) tells how much of the fine-tuning update Δf = finetuned − aligned lies where "
        "alignment changed the weights, V = aligned − base."
        + (" Δs = safety − aligned." if "safety" in sources else "")
    )
    parts = [told] + ([f"Method: {'; '.join(methods)}."] if methods else []) + ([symbols] if view.measured else [])
    return "\n\n".join(parts)


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]], right: int = 99) -> str:
    """A Markdown table; columns from `right` on are aligned right. Cells are Markdown already."""
    rule = ["---:" if index >= right else "---" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def _source_table(sources: Mapping[str, Mapping[str, Any]]) -> str:
    if not sources:
        return ""
    rows = []
    for role, source in sources.items():
        name = hub_id(source)
        label = f"[{markdown(source['label'])}](https://huggingface.co/{name})" if name else code(source["label"])
        revision = code(source["revision"]) if source.get("revision") else "–"
        rows.append([markdown(role), label, markdown(source.get("kind") or "–"), revision])
    return "## Sources\n\n" + _rows(["role", "source", "kind", "revision"], rows)


def _plan_table(view: Overview) -> str:
    kinds = view.kinds()
    if not kinds:
        return ""
    rows = []
    for kind, lines in list(kinds.items())[:MAX_KINDS]:
        rho = [line.rho for line in lines if line.rho is not None]
        null = median([line.rho_null for line in lines if line.rho_null is not None])
        counts = [grouped(sum(line.merged for line in lines)), grouped(len(lines))]
        spread = f"{fixed(min(rho))} to {fixed(max(rho))}" if rho else "–"
        rows.append([code(kind), *counts, fixed(median(rho)), spread, fixed(null)])
    heads = ["module type", "merged", "gated", "median ρ", "ρ from to", "median ρ₀"]
    if not view.measured:
        heads, rows = heads[:3], [row[:3] for row in rows]
    more = len(kinds) - MAX_KINDS
    rest = f"\n\n{things(more, 'further module type')} in `safemerge_plan.json`." if more > 0 else ""
    told = "`safemerge_plan.json` holds the decision on every tensor with its reason; `safemerge_report.html` shows it."
    return f"## Plan\n\n{_rows(heads, rows, 1)}{rest}\n\n{told}"


def _score_table(groups: Mapping[str, list[Score]]) -> str:
    if not groups:
        return ""
    models = list(dict.fromkeys(row.model for rows in groups.values() for row in rows))
    table = []
    for label, rows in groups.items():
        rate, by_model = is_rate(rows), {row.model: row for row in rows}
        cells = []
        for model in models:
            row = by_model.get(model)
            between = interval(row, rate) if row else ""
            cells.append("–" if row is None else shown(row.value, rate) + (f" ({between})" if between else ""))
        sizes = {row.n for row in rows if row.n is not None}
        table.append([markdown(label), *cells, grouped(sizes.pop()) if len(sizes) == 1 else "–"])
    heads = ["task", *(markdown(model) for model in models), "examples"]
    return f"## Scores\n\n{_rows(heads, table, 1)}\n\nIn brackets: 95 % intervals."


def _repeat(origin: Mapping[str, Any]) -> str:
    versions = origin.get("versions")
    told = ""
    if isinstance(versions, Mapping) and versions:
        told = (
            "\n\nMade with "
            + ", ".join(f"{markdown(k, 60)} {markdown(v, 60)}" for k, v in list(versions.items())[:20])
            + "."
        )
    return (
        "## Repeat it\n\n`safemerge_recipe.yaml` in this folder is the recipe as it was resolved; the same "
        "recipe and sources give the same bytes.\n\n```sh\npip install safemerge-recipes\n"
        f"safemerge-run safemerge_recipe.yaml --output again\n```{told}"
    )
