"""`parameters` of a recipe and their uses: `${name}` gives way to values, as recipes are composed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from safemerge_recipes.recipe.composed import Composed
from safemerge_recipes.recipe.plain_values import mapping
from safemerge_recipes.recipe.yaml_text import Keys, YamlError, describe, read_yaml

MAX_PARAMETERS = 100
_USE = re.compile(r"\$(\$\{|\{([^{}]*)\})")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,60}")


def fill(found: Composed) -> None:
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
    if not equals or name not in known or (name == key.strip() and name in mapping(found.document.value)):
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
