"""Loads recipes for planning: with the names of what installed plugins bring, so that no other name passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safemerge_recipes.planning.plugins import read_registry
from safemerge_recipes.recipe.loading import LoadedRecipe, load_recipe, parse_recipe


def load(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The checked recipe of a file, or of standard input (`-`). Opens no source and needs no torch.

    Raises:
        RecipeError: with every problem in it, a line each.
    """
    known = read_registry()
    return load_recipe(path, overrides, metrics=known.names("metrics"), methods=known.names("methods"))


def vary(loaded: LoadedRecipe, overrides: Sequence[str]) -> LoadedRecipe:
    """The same recipe with further `KEY=VALUE` overrides. Raises RecipeError when one is wrong."""
    known, all_ = read_registry(), (*loaded.overrides, *overrides)
    return parse_recipe(loaded.text, loaded.path, all_, metrics=known.names("metrics"), methods=known.names("methods"))
