"""What composing works on: where a recipe's text comes from, and the document that becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safemerge_recipes.recipe.yaml_text import Document, Keys


@dataclass(frozen=True, slots=True)
class Own:
    """The repository that a recipe lies in, whose folders it may name as sources.

    Attributes:
        repository: its id.
        commit: the recipe's own.
        folder: the recipe's folder in it.
        folders: the names of the folders beside the recipe.
    """

    repository: str
    commit: str
    folder: str
    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a recipe's text comes from.

    Attributes:
        label: how messages call it.
        text: its content.
        directory: the folder that its relative paths start from; None for a recipe from elsewhere, which may name
            no file of this machine.
        parent: opens what it says under `extends`. Raises RecipeError.
        beside: of a recipe from elsewhere, the folder that holds what came with it, such as its lock.
        own: the repository it lies in.
    """

    label: str
    text: str
    directory: Path | None
    parent: Callable[[str], Place]
    beside: Path | None = None
    own: Own | None = None


@dataclass(slots=True)
class Composed:
    """A document that stands alone, the overrides left to apply, and what is wrong as (keys, message).

    `elsewhere` says of keys that come from another file where they stand: `base.yaml:7`.
    """

    document: Document
    overrides: tuple[str, ...]
    problems: list[tuple[Keys, str]] = field(default_factory=list)
    elsewhere: dict[Keys, str] = field(default_factory=dict)
