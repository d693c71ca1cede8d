"""Where a recipe may come from: a file, standard input, the folder of an output, a repository of the hub, the package.

A recipe from the hub comes with what locks it: its lock, or the manifest of the output that it lies in.
"""

from __future__ import annotations

import posixpath
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.engine.folder import MANIFEST_FILE, RECIPE_FILE
from safemerge_recipes.errors import RecipeError, SourceError
from safemerge_recipes.recipe.composed import Own, Place
from safemerge_recipes.recipe.yaml_text import MAX_BYTES
from safemerge_recipes.sharing.shipped import PREFIX, shipped_place
from safemerge_recipes.storage.files import MAX_BYTES as MAX_RECORD
from safemerge_recipes.storage.files import text_of

if TYPE_CHECKING:
    from safemerge_recipes.sources.hub import Repository  # a file of this machine needs no client of the hub

_REPOSITORY = r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
_ID = re.compile(rf"{_REPOSITORY}(?:@(?P<revision>[^@\s]+))?")
_ADDRESS = re.compile(
    rf"hf://{_REPOSITORY}(?:@(?P<early>[^@/\s]+))?(?:/(?P<file>[^@]+?))?(?:@(?P<revision>[^@\s]+))?/?"
)


def open_place(where: str | Path) -> tuple[Path, Place | None]:
    """(the path that messages name, the recipe's text and bounds) of a place; None for a file and standard input.

    Args:
        where: a file, an output's folder, `-`, `org/model[@revision]`, `hf://org/repo/file.yaml[@revision]`, or
            `safemerge:NAME` for one that is shipped.

    Raises:
        RecipeError: the hub does not give it, or it is no address of one.
    """
    text = str(where)
    if text.startswith(PREFIX):
        return shipped_place(text)
    if (place := abroad(text)) is not None:
        return Path(place.label), place
    path = Path(where)
    stored = path / RECIPE_FILE
    return (stored if text != "-" and path.is_dir() and stored.is_file() else path), None


def abroad(where: str) -> Place | None:
    """The recipe that an address or id of the hub names; None for a file of this machine.

    Raises:
        RecipeError: the hub does not give it, or it is no address of one.
    """
    if where.startswith("hf:"):
        found = _ADDRESS.fullmatch(where)
        if found is None:
            raise RecipeError(f"{where}: no address on the hub; expected hf://org/repo/file.yaml or one with @revision")
        return _open(found["name"], found["revision"] or found["early"], found["file"])
    found = _ID.fullmatch(where)
    if found is None or Path(where).exists() or Path(where).parent.is_dir() or where.endswith((".yaml", ".yml")):
        return None
    return _open(found["name"], found["revision"], None)


def _open(name: str, revision: str | None, file: str | None) -> Place:
    from safemerge_recipes.sources.hub import open_repository

    file = posixpath.normpath(file or RECIPE_FILE)
    folder = posixpath.dirname(file)
    try:
        repository = open_repository(name, revision, f"hf://{name}", folder)
        return _place(repository, file, folder)
    except SourceError as error:
        raise RecipeError(str(error)) from None


def _place(repository: Repository, file: str, folder: str) -> Place:
    """The recipe in a file of a repository, with its lock beside it."""
    from safemerge_recipes.sources.hub import HubFile, fetch

    known = repository.files or {}
    if not repository.has(file):
        others = ", ".join(f"hf://{repository.name}/{name}" for name in known if name.endswith((".yaml", ".yml")))
        such = f", such as {others[:500]}" if others else ""
        raise RecipeError(f"{repository.label}: has no {file}; expected a recipe there{such}")
    lock = posixpath.join(folder, f"{Path(file).stem}.lock.yaml")
    manifest = posixpath.join(folder, MANIFEST_FILE) if Path(file).name == RECIPE_FILE else lock
    for name, most in ((file, MAX_BYTES), (lock, MAX_BYTES), (manifest, MAX_RECORD)):
        if known.get(name, HubFile(0, None)).size > most:
            raise RecipeError(f"{repository.label}: {name} is larger than {most} bytes; expected a recipe and its lock")
    fetch(repository, [name for name in dict.fromkeys((file, lock, manifest)) if repository.has(name)])
    path = repository.path / file
    try:
        text = text_of(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{repository.label}/{file}: cannot be read: {str(error)[:200]}") from None
    label = f"{repository.name}@{repository.commit[:12]}/{file}"
    folders = repository.folders or tuple(one.name for one in path.parent.iterdir() if one.is_dir())
    own = Own(repository.name, repository.commit, folder, folders)
    return Place(label, text, None, partial(_parent, repository, folder), path.parent, own)


def _parent(repository: Repository, folder: str, named: str) -> Place:
    """What a recipe of the hub extends: a file of its own repository at the same commit, or another one's."""
    if named.startswith("hf:"):
        found = abroad(named)
        assert found is not None  # an address is one, or raises
        return found
    file = posixpath.normpath(posixpath.join(folder, named))
    if named.startswith(("/", "~")) or file.startswith("../") or "\\" in named:
        named = named[:200]
        raise RecipeError(f"{repository.label}: extends {named!r}, which lies outside it; expected one of its files")
    if named.endswith((".yaml", ".yml")):
        return _open(repository.name, repository.commit, file)
    found = abroad(named) if _ID.fullmatch(named) else None
    if found is None:
        raise RecipeError(f"{repository.label}: extends {named[:200]!r}; expected a .yaml file or an id of the hub")
    return found
