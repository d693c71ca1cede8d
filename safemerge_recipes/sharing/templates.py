"""What recipes that this program writes have in common: the line for editors, and places as others can follow them."""

from __future__ import annotations

import os
from pathlib import Path

from safemerge_recipes.recipe.model import Recipe

EDITOR_LINE = f"# yaml-language-server: $schema={Recipe.SCHEMA_ID}"
"""Tells editors where the schema of a recipe lies."""


def shown_place(place: str, folder: Path) -> str:
    """A source as a recipe in `folder` names it: a hub id stays, a folder that is here is seen from there."""
    here = Path(os.path.normpath(Path.cwd() / Path(place).expanduser()))
    looks_local = place.startswith((".", "/", "~")) or here.exists()
    if not looks_local or place.startswith("~"):
        return place
    if os.path.isabs(place):
        return place
    seen = os.path.relpath(here, folder)
    return seen if seen.startswith(".") else f"./{seen}"
