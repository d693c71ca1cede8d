"""Recipe files: YAML text to a checked `Recipe`, and back.

All problems of a file are listed at once, each with its line, its key, what was found and what was expected.
`--set KEY=VALUE` changes values before the check. Knows no model, no checkpoint and no torch.
"""

from __future__ import annotations

import difflib
import os.path
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.composing import Place, compose, escaped
from safemerge_recipes.recipe.model import (
    SELECTORS,
    GateChange,
    MergeChange,
    Recipe,
    Source,
    method_parameters,
)
from safemerge_recipes.recipe.yaml_text import MAX_BYTES, Document, Keys, YamlError, describe, read_yaml, write_yaml


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
        values = _plain(self.recipe)
        for role, source in self.recipe.sources.roles().items():
            folder = self.local(source)
            if folder is not None:
                key = next(key for key in ("model", "adapter", "location", "train") if getattr(source, key) is not None)
                given, path = values["sources"][role], rewritten(getattr(source, key), folder)
                values["sources"][role] = {**given, key: path} if isinstance(given, dict) else path
        for owner, key in _path_keys(values):
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


def _path_keys(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place in a plain recipe, other than its sources, that holds a path."""
    parts = [values, *values.get("rules", ())]
    for part in parts:
        mask = (part.get("merge") or {}).get("mask") or {}
        if mask.get("path") is not None:
            yield mask, "path"
    for owner, key in ((values.get("output") or {}, "path"), (values.get("evaluate") or {}, "task_path")):
        if owner.get(key) is not None:
            yield owner, key


# Reading


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    metrics: Collection[str] | None = None,
    methods: Collection[str] | None = None,
    stand_ins: Mapping[str, str] | None = None,
    place: Place | None = None,
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

    Raises:
        RecipeError: the file cannot be read, or with every problem in it, a line each.
    """
    if str(path) == "-":
        text, path = _standard_input(), STANDARD_INPUT
    else:
        path = Path(path)
        text = place.text if place else _read(path)
    return parse_recipe(text, path, overrides, metrics=metrics, methods=methods, stand_ins=stand_ins, place=place)


def parse_recipe(
    text: str,
    path: str | Path = "recipe.yaml",
    overrides: Sequence[str] = (),
    *,
    metrics: Collection[str] | None = None,
    methods: Collection[str] | None = None,
    stand_ins: Mapping[str, str] | None = None,
    place: Place | None = None,
) -> LoadedRecipe:
    """The checked recipe of YAML text, as if it stood in the file `path`. See `load_recipe`."""
    path = Path(path)
    directory = Path(os.path.normpath(Path.cwd() / path.parent))
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

    place = place or Place(str(path), text, directory, partial(_parent_of, directory))
    composed = compose(document, place, overrides, stand_ins)
    reader = _Reader(path, document, {}, [], composed.elsewhere)
    reader.problems += [(line, reader.place(keys, line), message) for line, keys, message in document.problems]
    for keys, message in composed.problems:
        reader.fail(keys, message)
    for override in composed.overrides:
        reader.override(override)
    context = {"directory": directory, "metrics": metrics, "methods": methods}
    try:
        recipe = Recipe.model_validate(document.value, context=context)
        recipe = _with_names(recipe, reader, directory)
    except ValidationError as errors:
        reader.explain(errors)
    if reader.problems:
        ordered = sorted(reader.problems, key=lambda problem: problem[0])
        raise RecipeError("\n".join(dict.fromkeys(f"{place}: {message}" for _, place, message in ordered)))
    return LoadedRecipe(recipe, path, directory, text, tuple(overrides), dict(stand_ins or {}), place)


def _parent_of(directory: Path, named: str) -> Place:
    """The recipe that a local one extends: a file beside it, or further off."""
    path = _absolute(named, directory)
    return Place(str(path), _read(path), path.parent, partial(_parent_of, path.parent))


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


def _read(path: Path, what: str = "a recipe file", kin: str = "*.y*ml") -> str:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise RecipeError(f"{path}: found a folder{_folder_hint(path)}; expected {what}")
        if size > MAX_BYTES:
            raise RecipeError(f"{path}: found {size} bytes; expected a recipe of at most {MAX_BYTES}")
        return path.read_bytes().decode("utf-8-sig")
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
    if "merge_method" in value and "sources" not in value:
        raise RecipeError(
            f"{path}: a configuration of mergekit; expected a recipe, which names its models under `sources` "
            "(base, aligned, finetuned, safety), says under `gate` which tensors are merged, and under `merge` how: "
            "`method: mergekit:NAME` is a method of mergekit"
        )


def read_names(path: Path) -> tuple[str, ...]:
    """The patterns of a `names_file`: one a line, blank lines and `#` comments left out.

    Raises:
        RecipeError: the file cannot be read or holds none.
    """
    lines = (line.split("#", 1)[0].strip() for line in _read(path, "a file of names", "*").splitlines())
    names = tuple(line for line in lines if line)
    if not names:
        raise RecipeError(f"{path}: found no names; expected one a line")
    return names


def _with_names(recipe: Recipe, reader: _Reader, directory: Path) -> Recipe:
    """The recipe with the names of every `names_file` in its place; a file that cannot be read is a problem."""

    def read(gate: Any, keys: Keys) -> Any:
        if gate is None:
            return None
        if gate.names_file is not None:
            try:
                names = read_names(_absolute(gate.names_file, directory))
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


@dataclass(slots=True)
class _Reader:
    """One reading of a file: its document, where its values come from, and the problems found so far."""

    path: Path
    document: Document
    origins: dict[Keys, str]
    problems: list[tuple[int, str, str]]
    elsewhere: Mapping[Keys, str] = field(default_factory=dict)

    def place(self, keys: Keys, line: int | None = None) -> str:
        """Where a problem is: an override or a line, and the key."""
        for end in range(len(keys), 0, -1):
            origin = self.origins.get(keys[:end])
            if origin is not None:
                return f"--set {origin}" if end == len(keys) else f"--set {origin}: {_dotted(keys)}"
        if line is None:
            for end in range(len(keys), 0, -1):
                if keys[:end] in self.document.lines:
                    break
                if keys[:end] in self.elsewhere:
                    return f"{self.elsewhere[keys[:end]]} {_dotted(keys)}"
        shown = line if line is not None else self.line(keys)
        return f"{self.path}:{shown} {_dotted(keys)}".rstrip()

    def line(self, keys: Keys) -> int:
        """The line of the key, or of the nearest that holds it."""
        return next(self.document.lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.document.lines)

    def fail(self, keys: Keys, message: str) -> None:
        overridden = any(keys[:n] in self.origins for n in range(len(keys) + 1))
        self.problems.append((10**9 if overridden else self.line(keys), self.place(keys), message))

    # Overrides

    def override(self, text: str) -> None:
        """Applies one `KEY=VALUE`, or notes why not."""
        key, equals, value_text = text.partition("=")
        shown = text if len(text) <= 80 else text[:77] + "..."

        def refuse(message: str) -> None:
            self.problems.append((10**9, f"--set {shown}", message))

        parts = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
        if not equals or "" in parts:
            return refuse("not an override; expected KEY=VALUE, such as gate.tau=0.6")
        try:
            document = read_yaml(value_text)
        except YamlError as error:
            return refuse(str(error))
        for _, keys, message in document.problems:
            refuse(f"{_dotted((*parts, *keys))}: {message}")

        owner = self.document.value
        for depth, part in enumerate(parts[:-1]):
            child = _child(owner, part)
            if isinstance(child, str) and depth == 1 and parts[0] == "sources":
                child = owner[part] = {"location": child}
            elif child is None and isinstance(owner, dict) and not isinstance(parts[depth + 1], int):
                child = owner[part] = {}
            if not isinstance(child, (dict, list)):
                above = _dotted(parts[: depth + 1])
                return refuse(f"there is no {above} that could hold it" if child is None else
                              f"{above} is {describe(child)}; expected a mapping")  # fmt: skip
            owner = child
        last = parts[-1]
        if isinstance(owner, list):
            if not isinstance(last, int) or last >= len(owner):
                return refuse(f"{_dotted(parts[:-1])} is a list of {len(owner)}; expected a position from 0")
        else:
            last = str(last)
            self._make_room(owner, parts, document.value)
        owner[last] = document.value
        keys = (*parts[:-1], last)
        for known in [known for known in self.origins if known[: len(keys)] == keys]:
            del self.origins[known]
        self.origins[keys] = shown
        return None

    def _make_room(self, owner: dict[str, Any], parts: Keys, value: object) -> None:
        """Removes what an override takes the place of: the gate's other selectors, other methods' keys."""
        for depth in range(1, len(parts)):
            holder, key = parts[depth - 1], parts[depth]
            if holder not in ("gate", "complement") or key not in SELECTORS:
                continue
            gate = self.document.value
            for part in parts[:depth]:
                gate = _child(gate, part)
            if isinstance(gate, dict):
                stale = [name for name in SELECTORS if name != key and name in gate]
                stale += ["per"] * (key not in ("lowest", "fraction") and "per" in gate)
                for name in stale:
                    if (*parts[:depth], name) not in self.origins:
                        del gate[name]
        if parts[-2:] == ("merge", "method") and isinstance(value, str) and owner.get("method") != value:
            keep = {key for key in method_parameters(value) if key not in ("normalize", "options")}
            for name in [name for name in owner if name not in keep and name in _names(MergeChange)]:
                if (*parts[:-1], name) not in self.origins:
                    del owner[name]

    # Messages

    def explain(self, errors: ValidationError) -> None:
        """Notes every problem pydantic found, in words; branches of a union become one line."""
        wanted: dict[tuple[Keys, str], list[str]] = {}
        for error in errors.errors(include_url=False):
            if error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
                continue  # a list that is only short of its bad items, which have their own lines
            keys = self._keys(error["loc"], error["type"])
            found, expected = self._words(keys, error)
            listed = wanted.setdefault((keys, found), [])
            if expected not in listed:
                listed.append(expected)
        for (keys, found), expected_list in wanted.items():
            first, *others = expected_list
            expected_text = " or ".join([first, *(part.removeprefix("expected ") for part in others)])
            self.fail(keys, f"{found}; {expected_text}" if expected_text else found)

    def _keys(self, location: Sequence[str | int], kind: str) -> Keys:
        """The keys of an error's place, without the names pydantic adds for the branches of a union."""
        keys: list[str | int] = []
        value: Any = self.document.value
        for number, part in enumerate(location):
            child = _child(value, part, missing := object())
            if child is not missing:
                keys.append(part)
                value = child
            elif number == len(location) - 1 and kind in ("missing", "recipe"):
                keys.append(part)
        return tuple(keys)

    def _words(self, keys: Keys, error: Any) -> tuple[str, str]:
        """What was found and what was expected."""
        kind, value, context = error["type"], error["input"], error.get("ctx", {})
        found = f"found {describe(value)}"
        if kind == "extra_forbidden":
            return "unknown key", self._suggest(keys)
        if kind == "missing":
            model = _model_at(keys[:-1])
            field = model.model_fields.get(str(keys[-1])) if model else None
            meaning = re.split(r"(?<=\.)\s", field.description)[0] if field and field.description else ""
            return "missing", f"expected: {meaning}" if meaning else "expected this key"
        if kind == "recipe":
            return error["msg"], ""
        if kind == "value_error":
            return str(context["error"]), ""
        if kind == "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"])
            if not allowed:
                return found, "expected true, or no such key"
            close = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
            hint = f'; did you mean "{close[0]}"?' if close else ""
            return found, f"expected {_either(allowed)}{hint}"
        if kind == "bool_type":
            word = str(value).lower() if isinstance(value, str) else ""
            write = {"no": "false", "off": "false", "yes": "true", "on": "true"}.get(word.replace('"', ""))
            return found, "expected true or false" + (f"; write {write}" if write else "")
        if kind == "string_pattern_mismatch":
            return found, self._pattern(keys, context["pattern"])
        if kind in ("model_type", "model_attributes_type") and _model_at(keys) is Source:
            return found, "expected a path or hub id, or a mapping"
        if kind in _EXPECTED:
            return found, f"expected {_EXPECTED[kind].format(**context)}"
        return found, f"expected otherwise: {error['msg']}"

    @staticmethod
    def _pattern(keys: Keys, pattern: str) -> str:
        if keys[-1] == "normalize":
            return "expected frobenius, spectral or rank:k"
        if keys[-1] in ("metric", "method"):
            known = builtins.METRICS if keys[-1] == "metric" else None
            return f"expected a name, such as {next(iter(known)) if known else 'linear or mergekit:<method>'}"
        return f"expected text that matches {pattern}"

    def _suggest(self, keys: Keys) -> str:
        model = _model_at(keys[:-1])
        if model is None:
            return ""
        names, key = _names(model), str(keys[-1])
        words = {name: name for name in names} | {w: n for w, n in _SYNONYMS.items() if n in names}
        close = difflib.get_close_matches(key.lower(), words, n=1)
        if close:
            return f'did you mean "{words[close[0]]}"?'
        parts = {
            name: part for name in ("gate", "merge", "output", "evaluate", "sources") if (part := _model_at((name,)))
        }
        homes = [name for name, part in parts.items() if part is not model and key in _names(part)]
        if homes:
            return f'did you mean "{homes[0]}.{key}"?'
        return f"expected one of {', '.join(names)}"


_SYNONYMS = {
    "threshold": "tau",
    "weight": "alpha",
    "top_k": "lowest",
    "patterns": "tensors",
    "layers": "tensors",
}
"""Words people know from elsewhere, each with the key it stands for here."""

_EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "finite_number": "a finite number",
    "string_type": "text; put it in quotes",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_too_short": "text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} in the list",
    "too_long": "at most {max_length}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def _either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _dotted(keys: Keys) -> str:
    return ".".join(_shown(key) for key in keys)


def _shown(key: str | int) -> str:
    text = str(key)
    return text if text.isprintable() and len(text) <= 60 else describe(text)


def _child(value: Any, part: str | int, default: Any = None) -> Any:
    if isinstance(value, dict):
        return value.get(part, default)
    if isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value):
        return value[part]
    return default


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _model_at(keys: Keys) -> type[BaseModel] | None:
    """The model that describes the mapping at some keys."""
    model: type[BaseModel] = Recipe
    for key in keys:
        if isinstance(key, int):
            continue
        field = next((f for name, f in model.model_fields.items() if (f.alias or name) == key), None)
        found = next(_models_in(field.annotation), None) if field else None
        if found is None:
            return None
        model = found
    return model


# Writing


def dump_recipe(recipe: Recipe) -> str:
    """Canonical YAML of a recipe, every used value written out; it loads back to an equal recipe."""
    return write_yaml(escaped(_plain(recipe)))


def _plain(value: Any) -> Any:
    """Plain values of a recipe: of rules what they change, of the rest all that is used and not null."""
    if isinstance(value, Source):
        whole = str(value)
        if value.location is not None and not value.subfolder and Source.model_validate(whole) == value:
            return whole
        return {key: part for key, part in value.given().items() if part is not None}
    if isinstance(value, (GateChange, MergeChange)):
        changes = type(value) in (GateChange, MergeChange)
        if changes:
            return {key: _plain(part) for key, part in value.given().items()}
        if isinstance(value, MergeChange):
            used = ("method", *method_parameters(value.method))
        else:
            used = tuple(key for key in _names(type(value)) if key != "rank" or value.metric == "residual")
            if value.metric not in builtins.METRICS and "rank" in value.model_fields_set:
                used = (*used, "rank")
    elif isinstance(value, BaseModel):
        used = tuple(_names(type(value)))
    elif isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    elif isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    else:
        return value
    fields = {field.alias or name: name for name, field in type(value).model_fields.items()}
    plain = {key: _plain(getattr(value, fields[key])) for key in used}
    return {key: part for key, part in plain.items() if part is not None and part != []}
