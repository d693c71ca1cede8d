"""Recipe files: YAML text to a checked `Recipe`.

All problems of a file are listed at once (`messages`), after `--set` has changed its values (`overrides`). Knows no
model, no checkpoint and no torch.
"""

from __future__ import annotations

import difflib
import os.path
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safemerge_recipes.errors import RecipeError, SourceError
from safemerge_recipes.recipe.composed import Place
from safemerge_recipes.recipe.composing import compose
from safemerge_recipes.recipe.messages import Reader
from safemerge_recipes.recipe.model import Recipe
from safemerge_recipes.recipe.overrides import override
from safemerge_recipes.recipe.source import Source, source_holders
from safemerge_recipes.recipe.writing import path_keys, plain_values
from safemerge_recipes.recipe.yaml_text import MAX_BYTES, Keys, YamlError, describe, read_yaml
from safemerge_recipes.storage.files import content_of, within

Abroad = Callable[[str], "Place | None"]
"""Opens a recipe that does not lie on this machine; None for a name that is none of one."""


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe with the place it came from. Relative paths in it are relative to `directory`.

    What files of names hold is read in: the recipe says everything itself, as `names`.
    """

    recipe: Recipe
    path: Path
    directory: Path
    text: str
    overrides: tuple[str, ...] = ()
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    place: Place | None = None

    def resolve(self, path: str) -> Path:
        """The absolute form of a path written in the recipe; `~` is the home folder."""
        return _absolute(path, self.directory)

    def local(self, source: Source) -> Path | None:
        """The folder a source names, or None where it is a hub id."""
        return _local(source, self.directory)

    def anchored(self) -> Recipe:
        """The same recipe with absolute paths, so that it can be stored elsewhere."""
        return self._with_paths(lambda written, absolute: str(absolute))

    def seen_from(self, folder: Path) -> Recipe:
        """The same recipe with relative paths that start at `folder`; absolute ones and those from `~` stay."""

        def moved(written: str, absolute: Path) -> str:
            if written.startswith("~") or os.path.isabs(written):
                return written
            path = os.path.relpath(absolute, folder)
            return path if path.startswith(".") else f"./{path}"

        return self._with_paths(moved)

    def _with_paths(self, rewritten: Callable[[str, Path], str]) -> Recipe:
        """The recipe with every local path replaced, given as it is written and in full."""
        values = plain_values(self.recipe)
        holders = {role: holder for holder, role in source_holders(values["sources"])}
        for role, source in self.recipe.sources.roles().items():
            folder = self.local(source)
            if folder is not None:
                key = next(key for key in ("model", "adapter", "location", "train") if getattr(source, key) is not None)
                holder = holders[role]
                given, path = holder[role], rewritten(getattr(source, key), folder)
                holder[role] = {**given, key: path} if isinstance(given, dict) else path
        for owner, key in path_keys(values):
            owner[key] = rewritten(owner[key], self.resolve(owner[key]))
        return Recipe.model_validate(values)


def _absolute(path: str, directory: Path) -> Path:
    given = Path(path)
    try:
        given = given.expanduser()
    except RuntimeError as error:
        raise RecipeError(f'"{path}": {error}; write the folder in full') from None
    # Not `resolve`: a link keeps its name, and the path need not exist.
    return Path(os.path.normpath(Path.cwd() / directory / given))


def _local(source: Source, directory: Path) -> Path | None:
    where = source.where
    folder = _absolute(where, directory)
    if source.train is not None:
        return folder
    looks_like_path = where.startswith((".", "/", "~")) or "\\" in where or where.count("/") > 1
    absolute = Path(where).is_absolute()
    return folder if looks_like_path or absolute or (source.revision is None and folder.exists()) else None


# Reading


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    metrics: Collection[str] | None = None,
    methods: Collection[str] | None = None,
    stand_ins: Mapping[str, str] | None = None,
    place: Place | None = None,
    abroad: Abroad | None = None,
) -> LoadedRecipe:
    """The checked recipe of a YAML file.

    Args:
        path: The file, or `-` for standard input, whose relative paths start at the current folder.
        overrides: `KEY=VALUE` texts, applied in order. Keys are joined by dots, list positions are numbers,
            and values are YAML. A selector of a gate takes the place of the file's; another `merge.method`
            forgets the file's keys that it does not use.
        metrics: Names of plugins' metrics; with them (even none) other unknown metrics are problems.
        methods: The same for merge methods.
        stand_ins: A folder or hub id for a role, instead of what the recipe names; a path starts at the current
            folder.
        place: Where the recipe comes from, if not from the file itself.
        abroad: Opens what a recipe of this machine extends and that lies elsewhere; None for what does not.

    Raises:
        RecipeError: the file cannot be read, or with every problem in it, a line each.
    """
    if str(path) == "-":
        text, path = _standard_input(), STANDARD_INPUT
    else:
        path = Path(path)
        text = place.text if place else _recipe_text(path)
    return parse_recipe(
        text, path, overrides,
        metrics=metrics, methods=methods, stand_ins=stand_ins, place=place, abroad=abroad,
    )  # fmt: skip


def parse_recipe(
    text: str,
    path: str | Path = "recipe.yaml",
    overrides: Sequence[str] = (),
    *,
    metrics: Collection[str] | None = None,
    methods: Collection[str] | None = None,
    stand_ins: Mapping[str, str] | None = None,
    place: Place | None = None,
    abroad: Abroad | None = None,
) -> LoadedRecipe:
    """The checked recipe of YAML text, as if it stood in the file `path`. See `load_recipe`."""
    path = Path(path)
    directory = (place and place.beside) or Path(os.path.normpath(Path.cwd() / path.parent))
    try:
        document = read_yaml(text)
    except YamlError as error:
        raise RecipeError(f"{path}:{error.line}: {error}") from None
    if document.value is None:
        raise RecipeError(f"{path}: the file is empty; expected a recipe with sources and gate")
    if not isinstance(document.value, dict):
        found = describe(document.value)
        raise RecipeError(f"{path}:{document.lines[()]}: found {found}; expected a mapping with sources and gate")
    _refuse_mergekit(path, document.value)

    place = place or Place(str(path), text, directory, partial(_parent_of, directory, abroad))
    composed = compose(document, place, overrides, stand_ins)
    reader = Reader(path, document, {}, [], composed.elsewhere)
    reader.problems += [(line, reader.place(keys, line), message) for line, keys, message in document.problems]
    for keys, problem in composed.problems:
        reader.fail(keys, problem)
    for change in composed.overrides:
        override(reader, change)
    context = {"directory": directory, "metrics": metrics, "methods": methods}
    try:
        recipe = Recipe.model_validate(document.value, context=context)
        if not composed.problems:  # no file is read for a recipe from elsewhere that may name none
            recipe = _with_names(recipe, reader, directory)
    except ValidationError as errors:
        told = {reader.place(keys, reader.line(keys)) for keys, _ in composed.problems}
        known = list(reader.problems)
        reader.explain(errors)  # of what has no value nothing more is said
        reader.problems[:] = [one for one in reader.problems if one in known or one[1] not in told]
    if reader.problems:
        ordered = sorted(reader.problems, key=lambda problem: problem[0])
        raise RecipeError("\n".join(dict.fromkeys(f"{place}: {message}" for _, place, message in ordered)))
    return LoadedRecipe(recipe, path, directory, text, tuple(overrides), dict(stand_ins or {}), place)


def _parent_of(directory: Path, abroad: Abroad | None, named: str) -> Place:
    """The recipe that a local one extends: a file beside it, or further off."""
    path = _absolute(named, directory)
    if abroad is not None and not path.exists() and (found := abroad(named)) is not None:
        return found
    return Place(str(path), _recipe_text(path), path.parent, partial(_parent_of, path.parent, abroad))


STANDARD_INPUT = Path("standard input")
"""Where a recipe comes from that was given as `-`."""


def _standard_input() -> str:
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(f"{STANDARD_INPUT}: found more than {MAX_BYTES} bytes; expected a recipe")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{STANDARD_INPUT}: not UTF-8 at byte {error.start}; expected a YAML text file") from None
    except (OSError, ValueError, AttributeError) as error:  # closed, or there is none
        raise RecipeError(f"{STANDARD_INPUT}: cannot be read: {error}") from None


def _recipe_text(path: Path) -> str:
    try:
        return _read(path)
    except SourceError as error:  # a pipe, a device
        raise RecipeError(str(error)) from None


def _read(path: Path, what: str = "a recipe file", kin: str = "*.y*ml") -> str:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise RecipeError(f"{path}: found a folder{_folder_hint(path)}; expected {what}")
        if size > MAX_BYTES:
            raise RecipeError(f"{path}: found {size} bytes; expected a recipe of at most {MAX_BYTES}")
        return content_of(path, MAX_BYTES, "any").decode("utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob(kin)) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f'; did you mean "{path.parent / close[0]}"?' if close else f"; expected {what}"
        raise RecipeError(f"{path}: there is no such file{hint}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}; expected a YAML text file") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None


def _folder_hint(folder: Path) -> str:
    """What a folder is that was given as a recipe, and what to do with it."""
    stored = folder / "safemerge_recipe.yaml"
    if stored.is_file():
        return f", an output of this program, whose recipe is {stored}"
    if (folder / "adapter_config.json").is_file():
        return " with a PEFT adapter, which a recipe names as in `sources: {finetuned: {adapter: FOLDER}}`"
    if (folder / "config.json").is_file():
        return " with a model, which a recipe names as in `sources: {finetuned: FOLDER}`"
    return ""


def _refuse_mergekit(path: Path, value: dict[str, Any]) -> None:
    """Says what a mergekit configuration is, instead of refusing its keys one by one."""
    if {"merge_method", "experts"} & set(value) and "sources" not in value:
        raise RecipeError(
            f"{path}: a configuration of mergekit; expected a recipe. `safemerge import {path} -o recipe.yaml` makes "
            "one of it"
        )


def read_names(path: Path) -> tuple[str, ...]:
    """The patterns of a `names_file`: one a line, blank lines and `#` comments left out.

    Raises:
        RecipeError: the file cannot be read or holds none.
        SourceError: it is no regular file.
    """
    lines = (line.split("#", 1)[0].strip() for line in _read(path, "a file of names", "*").splitlines())
    names = tuple(line for line in lines if line)
    if not names:
        raise RecipeError(f"{path}: found no names; expected one a line")
    return names


def _with_names(recipe: Recipe, reader: Reader, directory: Path) -> Recipe:
    """The recipe with the names of every `names_file` in its place; a file that cannot be read is a problem."""

    def read(gate: Any, keys: Keys) -> Any:
        if gate is None:
            return None
        if gate.names_file is not None:
            try:
                names = read_names(within(directory, _absolute(gate.names_file, directory)))
            except RecipeError as error:
                reader.fail((*keys, "names_file"), str(error))
                return gate
            gate = gate.model_copy(update={"names_file": None, "names": names})
            gate.model_fields_set.remove("names_file")
        if getattr(gate, "complement", None) is not None:
            gate = gate.model_copy(update={"complement": read(gate.complement, (*keys, "complement"))})
        return gate

    rules = tuple(
        rule.model_copy(update={"gate": read(rule.gate, ("rules", place, "gate"))})
        for place, rule in enumerate(recipe.rules)
    )
    return recipe.model_copy(update={"gate": read(recipe.gate, ("gate",)), "rules": rules})
