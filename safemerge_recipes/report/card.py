"""README.md of a result: a model card with Hugging Face metadata. Plain data in, Markdown out.

The metadata is huggingface_hub's `ModelCardData` and the body the template `assets/card.md`, both offline.
Outside text is escaped by the module `markdown`; no local path is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from safemerge_recipes.report.licences import licence_note
from safemerge_recipes.report.markdown import code, fenced, markdown, table
from safemerge_recipes.report.metadata import hub_id, is_adapter, metadata, sources_of
from safemerge_recipes.report.overview import Overview, read_plan
from safemerge_recipes.report.scores import (
    Score,
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
)
from safemerge_recipes.report.sentences import chance, methods, sentence
from safemerge_recipes.text import clean, fixed, grouped, median, things

_PAPER = "https://arxiv.org/abs/2503.17239"
MAX_KINDS = 60
MAX_TESTS = 60


def render_card(
    plan: Mapping[str, Any],
    *,
    scores: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    place: str = ".",
) -> str:
    """The model card; see `page.render_report` for the arguments.

    Args:
        plan: the content of safemerge_plan.json.
        scores: the content of a scores file.
        provenance: beside what the report shows, a source's `base_model` (the hub id that an adapter names) and
            the output's `pipeline_tag`.
        place: what the lines of usage load: this folder, or its id on the hub.

    Raises:
        ValueError: huggingface_hub does not accept the metadata.
    """
    from jinja2 import Template

    view = read_plan(plan)
    origin = provenance if isinstance(provenance, Mapping) else {}
    sources = sources_of(view, origin)
    groups, adapter = read_scores(scores), is_adapter(view)
    tests = [test for test in read_tests(scores) if not test.secondary]
    verdict, versions = headline(scores), origin.get("versions")
    # `ModelCard.from_template` does no more, but its module loads the hub's whole client, a fifth of a small run.
    template = Template((files("safemerge_recipes.report") / "assets" / "card.md").read_text(encoding="utf-8"))
    card = template.render(
        card_data=metadata(view, sources, groups, origin, adapter).to_yaml(),
        name=markdown(view.name),
        verdict=f"{markdown(verdict, 600)}." if verdict else "",
        separated=[f"{markdown(told, 600)}." for told in separations(scores)],
        about=_about(view, sources),
        notes=[markdown(note, 1000) for note in (*view.warnings[:20], chance(view), licence_note(sources)) if note],
        usage=_usage(place, adapter),
        score_table=_score_table(groups),
        test_table=_test_table(tests[:MAX_TESTS]),
        test_note=_test_note(len(tests)),
        cautions=[markdown(one, 1000) for one in read_cautions(scores)[:MAX_TESTS]],
        plan_table=_plan_table(view),
        source_table=_source_table(sources),
        repeat=_repeat(sources),
        command=_command(sources),
        recipe=fenced(origin["recipe"], "yaml") if origin.get("recipe") else "",
        versions=_versions(versions if isinstance(versions, Mapping) else {}),
    )
    return f"{card.rstrip()}\n"


def _about(view: Overview, sources: Mapping[str, Mapping[str, Any]]) -> str:
    """What this is, and by which method."""
    named = []
    for label, link, formula in methods(view):
        name = f"[{markdown(label)}]({link})" if link else markdown(label)
        named.append(name + (f", where the update becomes {markdown(formula)}" if formula else ""))
    symbols = (
        "ρ = cos(VVᵀΔf, Δf) tells how much of the fine-tuning update Δf = finetuned − aligned lies where "
        "alignment changed the weights, V = aligned − base."
        + (" Δs = safety − aligned." if "safety" in sources else "")
    )
    kind = "A LoRA adapter on the aligned model, from a" if is_adapter(view) else "A"
    parts = [
        markdown(view.description, 2000),
        f"{kind} layer-gated merge after [SafeMERGE]({_PAPER}): {markdown(sentence(view, True), 2000)}",
        f"Method: {'; '.join(named)}." if named else "",
        symbols if view.measured else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _usage(place: str, adapter: bool) -> str:
    """Three lines that run where the files lie, or anywhere once they are on the hub."""
    shown_place = json.dumps(clean(place, 200))
    kind, library = ("AutoPeftModelForCausalLM", "peft") if adapter else ("AutoModelForCausalLM", "transformers")
    lines = [f"from {library} import {kind}", f"model = {kind}.from_pretrained({shown_place})"]
    lines[1:1] = ["from transformers import AutoTokenizer"] if adapter else []
    if not adapter:
        lines[0] += ", AutoTokenizer"
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({shown_place})")
    return "\n".join(lines)


def _source_table(sources: Mapping[str, Mapping[str, Any]]) -> str:
    if not sources:
        return ""
    keys = [key for key in ("kind", "revision", "license") if any(source.get(key) for source in sources.values())]
    rows = []
    for role, source in sources.items():
        name = hub_id(source)
        label = f"[{markdown(source['label'])}](https://huggingface.co/{name})" if name else code(source["label"])
        cells = [code(source.get(key)) if key == "revision" else markdown(source.get(key) or "–") for key in keys]
        rows.append([markdown(role), label, *cells])
    return table(["role", "source", *({"license": "licence"}.get(key, key) for key in keys)], rows)


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
    rest = f"{things(more, 'further module type')} in `safemerge_plan.json`.\n\n" if more > 0 else ""
    told = "`safemerge_plan.json` holds the decision on every tensor with its reason; `safemerge_report.html` shows it."
    return f"{table(heads, rows, 1)}\n\n{rest}{told}"


def _score_table(groups: Mapping[str, list[Score]]) -> str:
    kept = {label: rows for label, rows in groups.items() if not is_secondary(rows[0].metric)}
    models = list(dict.fromkeys(row.model for rows in kept.values() for row in rows))
    lines = []
    for label, rows in kept.items():
        rate, by_model = is_rate(rows), {row.model: row for row in rows}
        cells = []
        for model in models:
            row = by_model.get(model)
            between = interval(row, rate) if row else ""
            cells.append("–" if row is None else shown(row.value, rate) + (f" ({between})" if between else ""))
        sizes = {row.n for row in rows if row.n is not None}
        lines.append([markdown(label), *cells, grouped(sizes.pop()) if len(sizes) == 1 else "–"])
    return table(["task", *(markdown(model) for model in models), "examples"], lines, 1) if lines else ""


def _test_table(tests: Sequence[Test]) -> str:
    rows = [
        [
            markdown(f"{test.model} against {test.reference}"),
            markdown(f"{test.task}, {test.metric}"),
            test.change + (f" ({test.between})" if test.between else ""),
            markdown(test.chance),
            markdown(test.finding, 400),
        ]
        for test in tests
    ]
    return table(["models", "task", "change", "p", "finding"], rows) if rows else ""


def _test_note(count: int) -> str:
    more = count - MAX_TESTS
    rest = f" {things(more, 'further test')} in `safemerge_scores.json`." if more > 0 else ""
    return "Paired by prompt, changes of rates in points with their 95 % intervals, p after Holm's correction." + rest


def _local(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Roles whose source is a folder that nobody else has."""
    return [role for role, source in sources.items() if hub_id(source) is None]


def _repeat(sources: Mapping[str, Mapping[str, Any]]) -> str:
    told = "`safemerge_recipe.yaml` in this folder is the recipe as it was resolved."
    local = _local(sources)
    if not local:
        return f"{told} Its sources are pinned: they give the same bytes again."
    named = ", ".join(f"{markdown(role)} ({code(sources[role].get('label'))})" for role in local)
    return (
        f"{told} It reads folders that are not on the hub: {named}. Whoever has the same files gets the same bytes; "
        "`safemerge_manifest.json` holds their sha256."
    )


def _command(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """The line that repeats the merge, with a place to fill in for each source that nobody else has."""
    stand_ins = "".join(f" --source {role}=PLACE" for role in _local(sources) if role.isalpha())
    return f"safemerge-run safemerge_recipe.yaml --output again{stand_ins}"


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{markdown(name, 60)} {markdown(one, 60)}" for name, one in list(versions.items())[:20])
