"""The metadata of a model card: what the result descends from, its licence, its scores. Plain data in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from safemerge_recipes.report.licences import licence_of
from safemerge_recipes.report.overview import Overview, mapping
from safemerge_recipes.report.scores import Score
from safemerge_recipes.text import clean

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

PIPELINE_TAGS = ("text-generation", "image-text-to-text", "text2text-generation", "text-classification")
"""What an output may be called; `sources.provenance` tells them from the architecture."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_adapter(view: Overview) -> bool:
    """Whether the result is an adapter and no full model."""
    return mapping(view.recipe.get("output")).get("format") == "adapter"


def sources_of(view: Overview, origin: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
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
    return name if (source.get("revision") or pinned) and is_hub_id(name) else None


def is_hub_id(name: object) -> bool:
    """Whether the hub would accept this as the id of a repository."""
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def base_models(sources: Mapping[str, Mapping[str, Any]], adapter: bool) -> list[str]:
    """The hub ids that the result descends from: the sources', and for local adapters what they were trained on.

    An adapter descends from the model that it lies on, so that is named alone where it is known.
    """
    found = []
    for role in ("aligned",) if adapter else sources:
        source = sources.get(role, {})
        found += [hub_id(source) or source.get("base_model")]
    if adapter and not any(map(is_hub_id, found)):
        found = [source.get("base_model") for source in sources.values() if source.get("kind") == "adapter"][:1]
    return list(dict.fromkeys(name for name in found if isinstance(name, str) and is_hub_id(name)))


def metadata(
    view: Overview,
    sources: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, list[Score]],
    origin: Mapping[str, Any],
    adapter: bool,
) -> ModelCardData:
    """The metadata of a card, checked as the hub reads it.

    Raises:
        ValueError: huggingface_hub does not accept it.
    """
    from huggingface_hub import EvalResult, ModelCardData

    bases = base_models(sources, adapter)
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
    more: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "merge"} if bases else {}
    tag = origin.get("pipeline_tag")
    data = ModelCardData(
        base_model=bases or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=tag if tag in PIPELINE_TAGS else None,
        tags=["merge", "safemerge"],
        model_name=view.name if results else None,
        eval_results=results or None,
        **licence_of(sources),
        **more,
    )
    ModelCardData(**yaml.safe_load(data.to_yaml()))  # what we publish is what the hub will read
    return data
