"""From a recipe as written to one that stands alone: `extends`, `parameters`, `x-…` keys, and sources stood in for.

Works on plain values before they are checked, and knows nothing of their meaning beyond where paths and sources
are. Whoever reads from elsewhere hands in a `Place`; nothing here opens a connection.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe.builtins import ROLES, SELECTORS
from safemerge_recipes.recipe.fields import ONTO
from safemerge_recipes.recipe.mask_files import mask_holders
from safemerge_recipes.recipe.merge_forms import displaced
from safemerge_recipes.recipe.source import source_holders
from safemerge_recipes.recipe.yaml_text import Document, Keys, YamlError, describe, read_yaml

MAX_DEPTH = 8
"""Recipes that may extend one another."""
MAX_PARAMETERS = 100
_USE = re.compile(r"\$(\$\{|\{([^{}]*)\})")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,60}")


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


def compose(
    document: Document, place: Place, overrides: Sequence[str] = (), stand_ins: Mapping[str, str] | None = None
) -> Composed:
    """Puts a recipe together.

    Args:
        document: the recipe's own; its value is a mapping and is changed.
        place: where it comes from.
        overrides: `KEY=VALUE` texts; those that set a parameter are used up.
        stand_ins: a place for a role, instead of what the recipe names.

    Raises:
        RecipeError: a parent cannot be read, or extends itself.
    """
    found = Composed(document, tuple(overrides))
    if place.directory is None:
        found.problems += _foreign(document.value, stand_ins or {}, None, place.own)
    _extend(found, place, stand_ins or {})
    value = document.value
    for key in [key for key in value if key.startswith("x-")]:
        del value[key]
    _fill(found)
    for role, where in (stand_ins or {}).items():
        if role in ROLES or role in _mapping(_mapping(document.value.get("sources")).get("others")):
            _stand_in(document.value, role, where)
        else:
            message = f"found --source {role}={where[:80]}; expected ROLE=PLACE, with a role of {', '.join(ROLES)}"
            found.problems.append((("sources",), f"{message}, or a name of sources.others"))
    return found


# extends


def _extend(found: Composed, place: Place, stand_ins: Mapping[str, str]) -> None:
    """Puts under the recipe what it extends, the nearest first."""
    labels, lines, here = [place.label], {(): found.document.lines.get(("extends",), 1)}, place.directory
    while (named := found.document.value.pop("extends", None)) is not None:
        if not isinstance(named, str) or not named.strip():
            found.problems.append((("extends",), f"found {describe(named)}; expected a recipe, such as ./base.yaml"))
            return
        place = place.parent(named)
        if place.label in labels:
            raise RecipeError(f"{labels[-1]}: extends {named}, which leads back to itself: {' → '.join(labels)}")
        labels.append(place.label)
        if len(labels) > MAX_DEPTH:
            raise RecipeError(f"{labels[0]}: extends {MAX_DEPTH} recipes one after another; expected fewer")
        parent = _parent(place)
        if place.directory is None:
            found.problems += _foreign(parent.value, stand_ins, here, place.own)
        else:
            _anchor(parent.value, place.directory)
        below = {keys: f"{place.label}:{line}" for keys, line in parent.lines.items() if keys}
        found.document.value = _under(found.document.value, parent.value)
        for keys, where in below.items():
            if keys not in found.document.lines:
                found.elsewhere.setdefault(keys, where)
    found.document.lines.setdefault((), lines[()])


def _parent(place: Place) -> Document:
    try:
        parent = read_yaml(place.text)
    except YamlError as error:
        raise RecipeError(f"{place.label}:{error.line}: {error}") from None
    if not isinstance(parent.value, dict):
        raise RecipeError(f"{place.label}: found {describe(parent.value)}; expected a recipe, or a part of one")
    if parent.problems:
        line, keys, message = parent.problems[0]
        raise RecipeError(f"{place.label}:{line} {'.'.join(map(str, keys))}: {message}")
    return parent


def _under(child: Any, parent: Any, keys: Keys = ()) -> Any:
    """The child's values over the parent's: mappings are joined, everything else is replaced.

    A selector takes the place of the parent's, a source of its source, another merge method of all its keys.
    """
    if not isinstance(child, dict) or not isinstance(parent, dict):
        return child
    if keys[:1] == ("sources",) and len(keys) == (3 if keys[1:2] == ("others",) else 2):
        return child
    kept = dict(parent)
    if keys[-1:] in (("gate",), ("complement",)) and any(key in child for key in SELECTORS):
        kept = {key: value for key, value in kept.items() if key not in (*SELECTORS, "per")}
    if keys[-1:] == ("merge",) and child.get("method", parent.get("method")) != parent.get("method"):
        kept = {}
    if keys[-1:] == ("merge",):
        kept = {key: value for key, value in kept.items() if key not in displaced(child)}
    return kept | {key: _under(value, parent.get(key), (*keys, key)) for key, value in child.items()}


def _anchor(value: dict[str, Any], directory: Path) -> None:
    """Writes the relative paths of a local parent in full, since they start from its own folder."""
    for holder, key in (*_paths(value), *_sources(value)):
        where = holder[key]
        given = os.path.expanduser(where)
        if where.startswith((".", "~")) or (directory / given).exists():
            holder[key] = os.path.normpath(directory / given)


def _paths(value: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place of a recipe's plain values, other than its sources, that holds a path."""
    rules = value.get("rules")
    for part in (value, *(rules if isinstance(rules, list) else ())):
        gate, merge = (_mapping(_mapping(part).get(key)) for key in ("gate", "merge"))
        yield from ((g, "names_file") for g in (gate, _mapping(gate.get("complement"))) if _text(g, "names_file"))
        yield from ((mask, "path") for mask in mask_holders(merge))
    for owner, key in (("output", "path"), ("evaluate", "task_path")):
        if _text(held := _mapping(value.get(owner)), key):
            yield held, key


def _sources(value: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place of a recipe's plain values that names a source."""
    for sources, role in source_holders(value.get("sources")):
        source = sources[role]
        if isinstance(source, str):
            yield sources, role
        held = _mapping(source)
        yield from ((held, key) for key in ("model", "adapter", "location", "train") if _text(held, key))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Mapping[str, Any], key: str) -> bool:
    return isinstance(value.get(key), str)


# Recipes from elsewhere


_ASKS = ("verdict", "llama-guard-3", "harmbench", "strongreject")
"""What a judge may be asked by name; anything else is a file."""


def _foreign(
    value: dict[str, Any], stand_ins: Mapping[str, str], here: Path | None, own: Own | None
) -> list[tuple[Keys, str]]:
    """What a recipe from elsewhere may not say: no file, folder or server of this machine. Its output is ours.

    `here` is the folder of the recipe of this machine that extends it, where a hub id may not lead. A folder beside the
    recipe in its `own` repository is that folder of the repository.
    """
    _mapping(value.get("output")).pop("path", None)
    found: list[tuple[Keys, str]] = []
    for _, key in _paths(value):
        found.append(((key,), "names a file; a recipe from elsewhere may name none: copy it here first"))
    judge = _mapping(_mapping(value.get("evaluate")).get("judge"))
    asked, model = judge.get("prompt"), judge.get("model")
    if judge.get("url") is not None or (asked is not None and asked not in _ASKS) or (model and _is_folder(model)):
        message = "names a server, a file or a folder; a recipe from elsewhere may name none: copy it here first"
        found.append((("evaluate", "judge"), message))
    for sources, role in source_holders(value.get("sources")):
        source = sources[role]
        given = _mapping(source)
        named = [given[k] for k in ("model", "adapter", "location", "train") if _text(given, k)]
        where = source if isinstance(source, str) else next(iter(named), "")
        inside = posixpath.normpath(posixpath.join(where, str(given.get("subfolder") or "")))
        beside = where.startswith("./") and "train" not in given
        if own is not None and beside and inside.partition("/")[0] in own.folders:
            key = next((key for key in ("model", "adapter") if key in given), "location")
            kept = {"on": given["on"]} if "on" in given else {}
            subfolder = posixpath.join(own.folder, inside)
            sources[role] = {key: own.repository, "revision": own.commit, "subfolder": subfolder, **kept}
            continue
        if role not in stand_ins and ("train" in given or _is_folder(where)):
            message = f"names {where[:200]!r}, a folder of its author's; say --source {role}=PLACE for one that is here"
            found.append((("sources", role), message))
        elif role not in stand_ins and here is not None and (here / where.partition("@")[0]).exists():
            message = f"names {where[:200]!r} on the hub, and a folder here has that name; say --source {role}=PLACE"
            found.append((("sources", role), message))
    return found


def _is_folder(where: object) -> bool:
    """Whether a source is a path, where a hub id is the only other thing it may be."""
    text = str(where)
    return text.startswith((".", "/", "~")) or "\\" in text or text.partition("@")[0].count("/") != 1


# Parameters


def _fill(found: Composed) -> None:
    """Sets and uses the parameters: `${name}` alone becomes the value itself, within other text its text."""
    value = found.document.value
    declared = value.pop("parameters", None)
    if declared is not None and (not isinstance(declared, dict) or len(declared) > MAX_PARAMETERS):
        found.problems.append((("parameters",), f"found {describe(declared)}; expected a mapping of at most 100 names"))
        declared = {}
    known: dict[str, Any] = {}
    for name, given in (declared or {}).items():
        keys = ("parameters", name)
        if not _NAME.fullmatch(name):
            found.problems.append((keys, "expected a name of letters, digits and _"))
        elif isinstance(given, dict):
            if unknown := [key for key in given if key not in ("default", "description")]:
                found.problems.append(((*keys, unknown[0]), "unknown key; expected default or description"))
            known[name] = given.get("default", _MISSING)
        else:
            known[name] = given
        if isinstance(known.get(name), (dict, list)):
            found.problems.append((keys, f"found {describe(known[name])}; expected a number, a text or a truth value"))
            known[name] = _MISSING
    found.overrides = tuple(text for text in found.overrides if not _set(found, known, text))
    found.document.value = _filled(found, value, known, ())


_MISSING: Any = object()


def _set(found: Composed, known: dict[str, Any], text: str) -> bool:
    """Whether an override sets a parameter, and if so sets it."""
    key, equals, given = text.partition("=")
    name = key.strip().removeprefix("parameters.")
    if not equals or name not in known or (name == key.strip() and name in _mapping(found.document.value)):
        return False
    try:
        known[name] = read_yaml(given).value
    except YamlError as error:
        found.problems.append((("parameters", name), f"--set {text[:80]}: {error}"))
    return True


def _filled(found: Composed, value: Any, known: Mapping[str, Any], keys: Keys) -> Any:
    if isinstance(value, dict):
        return {key: _filled(found, part, known, (*keys, key)) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(found, part, known, (*keys, index)) for index, part in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    whole = _USE.fullmatch(value)
    if whole and whole[2] is not None:
        return _value(found, whole[2], known, keys)
    return _USE.sub(lambda m: "${" if m[2] is None else str(_value(found, m[2], known, keys)), value)


def _value(found: Composed, name: str, known: Mapping[str, Any], keys: Keys) -> Any:
    if known.get(name, _MISSING) is not _MISSING:
        return known[name]
    message = f"parameter {name} has no default; say --set {name}=VALUE" if name in known else (
        f"found ${{{name[:60]}}}, but no such parameter; expected it under `parameters`, or $${{ for that text"
    )  # fmt: skip
    found.problems.append((keys, message))
    return ""


# Stand-ins


def _stand_in(value: dict[str, Any], role: str, where: str) -> None:
    """Names another place for a role; what kind of source it is, and what an adapter lies on, stays."""
    here = Path(os.path.expanduser(where))
    if where.startswith((".", "/", "~")) or here.exists():
        where = os.path.abspath(here)
    sources = value.setdefault("sources", {})
    if not isinstance(sources, dict):
        return
    if role not in ROLES:
        sources = _mapping(sources.setdefault("others", {}))
    source = sources.get(role)
    if not isinstance(source, dict):
        sources[role] = where
        return
    key = next((key for key in ("model", "adapter", "location") if key in source), "location")
    sources[role] = {key: where} | {key: source[key] for key in ("on", ONTO) if key in source}


def escaped(value: Any) -> Any:
    """Plain values whose texts read back as themselves: `${` is written `$${`."""
    if isinstance(value, dict):
        return {key: escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [escaped(part) for part in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


PLACEHOLDER = {"$ref": "#/$defs/Placeholder"}
"""What the schema allows in the place of a value: `${name}`."""
_PLACEHOLDER = {
    "type": "string",
    "pattern": r"^\$\{[A-Za-z_][A-Za-z0-9_-]{0,60}\}$",
    "description": "The value of a parameter.",
}
_SAID = ("description", "default", "title")


def add_to_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a recipe with what composing takes away before the recipe is checked."""
    value = {"type": ["number", "string", "boolean", "null"]}
    full = {
        "type": "object",
        "properties": {"default": value, "description": {"type": "string"}},
        "additionalProperties": False,
    }
    added = {
        "extends": {"type": "string", "description": "A recipe that this one changes, relative to this file."},
        "parameters": {
            "type": "object",
            "description": "Values used as `${name}` and set by `--set name=VALUE`.",
            "additionalProperties": {"anyOf": [value, full]},
        },
    }
    needed = schema.get("required", [])
    rest = {key: part for key, part in schema.items() if key != "required"}
    parts = {name: _with_placeholders(part) for name, part in schema["$defs"].items()}
    return rest | {
        "$defs": parts | {"Placeholder": _PLACEHOLDER},
        "properties": {**_with_placeholders(schema)["properties"], **added},
        "patternProperties": {"^x-": {}},
        "anyOf": [{"required": ["extends"]}, {"required": needed}],
    }


def _with_placeholders(part: dict[str, Any]) -> dict[str, Any]:
    """A mapping's schema in which `${name}` may stand for every value but a method, which tells forms apart."""
    if "anyOf" in part and "properties" not in part:
        return part | {"anyOf": [_with_placeholders(one) for one in part["anyOf"]]}
    given = part.get("properties")
    if given is None:
        return part
    return part | {"properties": {key: one if key == "method" else _fillable(one) for key, one in given.items()}}


def _fillable(one: dict[str, Any]) -> dict[str, Any]:
    """A value's schema, or `${name}` where it would refuse that text."""
    options = one.get("anyOf", [one])
    kinds = [option for option in options if option.get("type") in ("number", "integer", "boolean", "string")]
    if not kinds or any(
        option["type"] == "string" and not {"const", "enum", "pattern"} & option.keys() for option in kinds
    ):
        return one
    said = {key: one[key] for key in _SAID if key in one}
    bare = [{key: part for key, part in option.items() if key not in _SAID} for option in options]
    return {"anyOf": [*bare, PLACEHOLDER], **said}
