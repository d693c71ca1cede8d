"""Recipes as text: shown in full, locked to what they read, and what they may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safemerge_recipes.api.given import loaded_of
from safemerge_recipes.events import Listener, ignore

if TYPE_CHECKING:
    from safemerge_recipes.api.given import RecipeLike


def show(recipe: RecipeLike) -> str:
    """A recipe as YAML that stands alone: what it extends joined in, parameters filled in, every used value in full."""
    from safemerge_recipes.recipe.writing import dump_recipe

    return dump_recipe(loaded_of(recipe).recipe)


def lock(recipe: RecipeLike, on_event: Listener = ignore) -> Path:
    """Writes `recipe.lock.yaml` beside a recipe: commit, size and sha256 of every file that it reads now.

    Returns:
        The lock.

    Raises:
        RecipeError: the recipe is wrong.
        SourceError: a source is missing, broken, or does not fit the others.
    """
    from safemerge_recipes.pipeline.lock import check_place, write_lock
    from safemerge_recipes.pipeline.opening import open_sources

    loaded = loaded_of(recipe)
    check_place(loaded)
    return write_lock(open_sources(loaded, on_event, locked=False))


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe: as it was generated, since making it imports every merge method."""
    from safemerge_recipes.storage.files import MAX_BYTES, text_of

    package = Path(__file__).parents[1]
    homes = package / "recipe", package.parent / "docs"  # in an installed package, and in a checkout
    for path in (home / "safemerge-recipe.schema.json" for home in homes):
        if path.exists():
            found: dict[str, Any] = json.loads(text_of(path, MAX_BYTES))
            return found
    from safemerge_recipes.recipe.model import json_schema

    return json_schema()


def registered() -> list[dict[str, str]]:
    """What recipes may name: kind, name, the distribution that brings it, and where its object lies.

    The last line may stand for all methods of mergekit, without a place.

    Raises:
        RecipeError: two distributions bring one name, or an object cannot be imported.
    """
    from safemerge_recipes.planning.plugins import KINDS, read_registry

    known = read_registry()
    entries = [entry for kind in KINDS for entry in known.entries[kind].values()]
    for entry in entries:
        entry.load()
    rows = [{"kind": e.kind, "name": e.name, "origin": e.origin, "target": e.target} for e in entries]
    if origin := known.origin("methods", "mergekit:"):
        rows.append({"kind": "methods", "name": "mergekit:<any of its methods>", "origin": origin, "target": ""})
    return rows
