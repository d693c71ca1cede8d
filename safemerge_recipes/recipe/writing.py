"""A recipe as plain values and as canonical YAML, and the places in it that hold paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.composing import escaped
from safemerge_recipes.recipe.fields import Strict
from safemerge_recipes.recipe.gate import Gate, GateChange
from safemerge_recipes.recipe.mask_files import mask_holders
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_change import MergeChange
from safemerge_recipes.recipe.model import Recipe
from safemerge_recipes.recipe.source import Source
from safemerge_recipes.recipe.yaml_text import write_yaml


def dump_recipe(recipe: Recipe) -> str:
    """Canonical YAML of a recipe, every used value written out; it loads back to an equal recipe."""
    return write_yaml(escaped(plain_values(recipe)))


def plain_values(value: Any) -> Any:
    """Plain values of a recipe: of rules what they change, of the rest all that is used and not null."""
    if isinstance(value, Source):
        whole = str(value)
        if value.location is not None and not value.subfolder and Source.model_validate(whole) == value:
            return whole
        return {key: part for key, part in value.given().items() if part is not None}
    if type(value) is GateChange or isinstance(value, MergeChange):
        return {key: plain_values(part) for key, part in value.given().items()}
    if isinstance(value, Gate):
        told = value.uses_rank and (value.metric in builtins.METRICS or "rank" in value.model_fields_set)
        used = [key for key in value.key_names() if key != "rank"] + ["rank"] * told
    elif isinstance(value, Merge):
        used = ["method", *value.parameters()]
    elif isinstance(value, Strict):
        used = value.key_names()
    elif isinstance(value, (tuple, list)):
        return [plain_values(part) for part in value]
    elif isinstance(value, dict):
        return {key: plain_values(part) for key, part in value.items()}
    else:
        return value
    fields = {field.alias or name: name for name, field in type(value).model_fields.items()}
    plain = {key: plain_values(getattr(value, fields[key])) for key in used}
    return {key: part for key, part in plain.items() if part is not None and part != []}


def path_keys(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place in a plain recipe, other than its sources, that holds a path."""
    parts = [values, *values.get("rules", ())]
    for part in parts:
        yield from ((mask, "path") for mask in mask_holders(part.get("merge")))
    for owner, key in ((values.get("output") or {}, "path"), (values.get("evaluate") or {}, "task_path")):
        if owner.get(key) is not None:
            yield owner, key
