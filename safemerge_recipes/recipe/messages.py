"""What is wrong with a recipe, in words: each problem with its line or override, its key, what was found and wanted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safemerge_recipes.recipe import builtins
from safemerge_recipes.recipe.fields import Strict, models_in
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_change import MergeChange, any_change
from safemerge_recipes.recipe.model import Recipe
from safemerge_recipes.recipe.source import Source
from safemerge_recipes.recipe.yaml_text import Document, Keys, describe


@dataclass(slots=True)
class Reader:
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
                return f"--set {origin}" if end == len(keys) else f"--set {origin}: {dotted(keys)}"
        if line is None:
            for end in range(len(keys), 0, -1):
                if keys[:end] in self.document.lines:
                    break
                if keys[:end] in self.elsewhere:
                    return f"{self.elsewhere[keys[:end]]} {dotted(keys)}"
        shown = line if line is not None else self.line(keys)
        return f"{self.path}:{shown} {dotted(keys)}".rstrip()

    def line(self, keys: Keys) -> int:
        """The line of the key, or of the nearest that holds it."""
        return next(self.document.lines[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.document.lines)

    def fail(self, keys: Keys, message: str) -> None:
        """Notes a problem at some keys."""
        overridden = any(keys[:n] in self.origins for n in range(len(keys) + 1))
        self.problems.append((10**9 if overridden else self.line(keys), self.place(keys), message))

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
            held = child(value, part, missing := object())
            if held is not missing:
                keys.append(part)
                value = held
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
            meaning = re.split(r"(?<=\.)\s", model.meanings().get(str(keys[-1]), ""))[0] if model else ""
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
        names, key = model.key_names(), str(keys[-1])
        if key == "<<":
            return "YAML 1.2 has no merge keys; take a value whole by its alias, or join recipes with `extends`"
        words = {name: name for name in names} | {w: n for w, n in _SYNONYMS.items() if n in names}
        close = difflib.get_close_matches(key.lower(), words, n=1)
        if close:
            return f'did you mean "{words[close[0]]}"?'
        parts = {
            name: part for name in ("gate", "merge", "output", "evaluate", "sources") if (part := _model_at((name,)))
        }
        homes = [name for name, part in parts.items() if part is not model and key in part.key_names()]
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


def dotted(keys: Keys) -> str:
    """Keys as users write them."""
    return ".".join(_shown(key) for key in keys)


def _shown(key: str | int) -> str:
    text = str(key)
    return text if text.isprintable() and len(text) <= 60 else describe(text)


def child(value: Any, part: str | int, default: Any = None) -> Any:
    """What a mapping or list holds under a key or position."""
    if isinstance(value, dict):
        return value.get(part, default)
    if isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value):
        return value[part]
    return default


def _model_at(keys: Keys) -> type[Strict] | None:
    """The model that describes the mapping at some keys."""
    model: type[Strict] = Recipe
    for key in keys:
        if isinstance(key, int):
            continue
        field = next((f for name, f in model.model_fields.items() if (f.alias or name) == key), None)
        found = next(models_in(field.annotation), None) if field else None
        if found is None:
            return None
        model = any_change() if found in (Merge, MergeChange) else found  # which knows the keys of every method
    return model
