"""Where paths and sources stand in a recipe's plain values, before these are checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from safemerge_recipes.recipe.mask_files import mask_holders
from safemerge_recipes.recipe.source import source_holders


def paths_of(value: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place of a recipe's plain values, other than its sources, that holds a path."""
    rules = value.get("rules")
    for part in (value, *(rules if isinstance(rules, list) else ())):
        gate, merge = (mapping(mapping(part).get(key)) for key in ("gate", "merge"))
        yield from ((g, "names_file") for g in (gate, mapping(gate.get("complement"))) if has_text(g, "names_file"))
        yield from ((mask, "path") for mask in mask_holders(merge))
    for owner, key in (("output", "path"), ("evaluate", "task_path")):
        if has_text(held := mapping(value.get(owner)), key):
            yield held, key


def sources_of(value: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place of a recipe's plain values that names a source."""
    for sources, role in source_holders(value.get("sources")):
        source = sources[role]
        if isinstance(source, str):
            yield sources, role
        held = mapping(source)
        yield from ((held, key) for key in ("model", "adapter", "location", "train") if has_text(held, key))


def mapping(value: Any) -> dict[str, Any]:
    """A mapping itself, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def has_text(value: Mapping[str, Any], key: str) -> bool:
    """Whether a text stands under a key."""
    return isinstance(value.get(key), str)
