"""Where a recipe may come from: a file, standard input, or the folder of an output."""

from __future__ import annotations

from pathlib import Path

from safemerge_recipes.engine.folder import RECIPE_FILE


def recipe_at(place: str | Path) -> Path:
    """The recipe file that a place means: itself, or of an output's folder the recipe that lies in it."""
    path = Path(place)
    stored = path / RECIPE_FILE
    return stored if str(place) != "-" and path.is_dir() and stored.is_file() else path
