"""The recipes that come with the package: `safemerge:defenses/resta`. Their paths start at the current folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe.composed import Place
from safemerge_recipes.storage.files import MAX_BYTES, text_of

PREFIX = "safemerge:"
GROUPS = ("defenses",)
"""The folders of recipes that are shipped."""


def _home() -> Path:
    """Where they lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next((home for home in (package / "recipes", package.parent / "recipes") if home.is_dir()), package)


def shipped() -> dict[str, Path]:
    """Every shipped recipe by name, such as `defenses/resta`."""
    home = _home()
    return {f"{group}/{p.stem}": p for group in GROUPS for p in sorted((home / group).glob("*.yaml"))}


def shipped_text(name: str) -> str:
    """A shipped recipe; `resta` stands for `defenses/resta`.

    Raises:
        RecipeError: there is none of that name.
    """
    known = shipped()
    asked = name.removeprefix(PREFIX).removesuffix(".yaml")
    path = known.get(asked) or next((p for one, p in known.items() if one.rpartition("/")[2] == asked), None)
    if path is None:
        close = difflib.get_close_matches(asked, [*known, *(one.rpartition("/")[2] for one in known)], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`safemerge recipes` lists them"
        raise RecipeError(f"{PREFIX}{asked[:200]}: no recipe of that name is shipped; {hint}")
    return text_of(path, MAX_BYTES)


def what_it_is(text: str) -> str:
    """What a recipe says of itself in its first lines of comment: where it comes from."""
    lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("# ") and "$schema" not in line]
    source = next((line for line in lines if line.startswith("Source: ")), lines[0] if lines else "")
    return source.removeprefix("Source: ").strip()


def shipped_place(name: str) -> tuple[Path, Place]:
    """(the path that messages and a lock go by, text and place) of a shipped recipe; see `shipped_text`."""

    def parent(named: str) -> Place:
        raise RecipeError(f"{name}: extends {named[:200]!r}; expected a shipped recipe to stand alone")

    path = Path(f"{name.removeprefix(PREFIX).rpartition('/')[2].removesuffix('.yaml')}.yaml")
    return path, Place(name, shipped_text(name), Path.cwd(), parent)
