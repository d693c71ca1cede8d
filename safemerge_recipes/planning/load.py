"""Loads recipes for planning: with the names of what installed plugins bring, so that no other name passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safemerge_recipes.planning.plugins import read_registry
from safemerge_recipes.recipe.composed import Place
from safemerge_recipes.recipe.loading import Abroad, LoadedRecipe, load_recipe, parse_recipe


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    stand_ins: Mapping[str, str] | None = None,
    place: Place | None = None,
    abroad: Abroad | None = None,
) -> LoadedRecipe:
    """The checked recipe of a file, or of standard input (`-`). Opens no source and needs no torch.

    Args:
        path: the file.
        overrides: `KEY=VALUE` texts.
        stand_ins: a folder or hub id for a role, instead of what the recipe names.
        place: where the recipe comes from, if not from the file itself.
        abroad: opens what it extends and that lies elsewhere.

    Raises:
        RecipeError: with every problem in it, a line each.
    """
    known = read_registry()
    return load_recipe(
        path, overrides, metrics=known.names("metrics"), methods=known.names("methods"),
        stand_ins=stand_ins, place=place, abroad=abroad,
    )  # fmt: skip


def vary(loaded: LoadedRecipe, overrides: Sequence[str]) -> LoadedRecipe:
    """The same recipe with further `KEY=VALUE` overrides. Raises RecipeError when one is wrong."""
    known = read_registry()
    return parse_recipe(
        loaded.text, loaded.path, (*loaded.overrides, *overrides),
        metrics=known.names("metrics"), methods=known.names("methods"),
        stand_ins=loaded.stand_ins, place=loaded.place,
    )  # fmt: skip
