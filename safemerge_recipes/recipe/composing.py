"""From a recipe as written to one that stands alone: `extends`, `parameters`, `x-…` keys, and sources stood in for.

Works on plain values before they are checked, and knows nothing of their meaning beyond where paths and sources
are. Whoever reads from elsewhere hands in a `Place`; nothing here opens a connection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe.builtins import ROLES, SELECTORS
from safemerge_recipes.recipe.composed import Composed, Place
from safemerge_recipes.recipe.fields import ONTO
from safemerge_recipes.recipe.foreign import check_foreign
from safemerge_recipes.recipe.merge_forms import displaced
from safemerge_recipes.recipe.parameters import fill
from safemerge_recipes.recipe.plain_values import mapping, paths_of, sources_of
from safemerge_recipes.recipe.yaml_text import Document, Keys, YamlError, describe, read_yaml

MAX_DEPTH = 8
"""Recipes that may extend one another."""


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
        found.problems += check_foreign(document.value, stand_ins or {}, None, place.own)
    _extend(found, place, stand_ins or {})
    value = document.value
    for key in [key for key in value if key.startswith("x-")]:
        del value[key]
    fill(found)
    for role, where in (stand_ins or {}).items():
        if role in ROLES or role in mapping(mapping(document.value.get("sources")).get("others")):
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
            found.problems += check_foreign(parent.value, stand_ins, here, place.own)
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
    for holder, key in (*paths_of(value), *sources_of(value)):
        where = holder[key]
        given = os.path.expanduser(where)
        if where.startswith((".", "~")) or (directory / given).exists():
            holder[key] = os.path.normpath(directory / given)


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
        sources = mapping(sources.setdefault("others", {}))
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
