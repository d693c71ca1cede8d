"""A mergekit file as frozen values: its models over which blocks, with which settings. All that has no counterpart in
a recipe is told at once, with its line.

Knows mergekit's file format and nothing of its code, and nothing of recipes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import RecipeError, SourceError
from safemerge_recipes.recipe.yaml_text import Document, Keys, YamlError, describe, read_yaml
from safemerge_recipes.storage.files import content_of

MAX_BYTES = 1_000_000
DTYPES = ("float32", "float16", "bfloat16")
SIDE_FILES = ("chat_template",)
"""Keys that say something of other files than the weights."""
MIXTURES = ("experts", "gate_mode")
"""Keys of a file for mergekit-moe."""


@dataclass(frozen=True, slots=True)
class Input:
    """A model that is merged: its folder or hub id, an adapter on it or None, its own settings, where it stands."""

    place: str
    adapter: str | None
    settings: Mapping[str, Any]
    keys: Keys

    @property
    def model(self) -> tuple[str, str | None]:
        """What tells it from others."""
        return self.place, self.adapter


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks [first, last) of every input, with the settings that hold for them; `last` None is the end."""

    first: int
    last: int | None
    inputs: tuple[Input, ...]
    settings: Mapping[str, Any]
    keys: Keys


@dataclass(slots=True)
class MergeFile:
    """A mergekit file, its problems as (keys, message), and what is not taken over but changes no weight."""

    label: str
    document: Document
    method: str = ""
    base: Input | None = None
    segments: tuple[Segment, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    problems: list[tuple[Keys, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def line(self, keys: Keys) -> int:
        """The line of a value, or of the nearest thing above it."""
        while keys and keys not in self.document.lines:
            keys = keys[:-1]
        return self.document.lines.get(keys, 1)

    def check(self) -> None:
        """Raises RecipeError with a line for every problem."""
        if self.problems:
            told = sorted((self.line(keys), ".".join(map(str, keys)), message) for keys, message in self.problems)
            lines = [f"{self.label}:{line} {keys}: {message}" for line, keys, message in told]
            raise RecipeError("\n".join(dict.fromkeys(lines)))


def read_file(path: Path) -> MergeFile:
    """The file as it is written.

    Raises:
        RecipeError: it cannot be read or is no mergekit file.
    """
    try:
        text = content_of(path, MAX_BYTES, "any").decode("utf-8-sig")
    except (OSError, ValueError, SourceError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{path}: cannot be read: {reason}; expected a mergekit file") from None
    return read_text(text, str(path))


def read_text(text: str, label: str) -> MergeFile:
    """The same of a text; see `read_file`."""
    if chained := re.search(r"^---[^\S\n]*\n(?s:.*?)^---", f"---\n{text.removeprefix('---').lstrip()}\n", flags=re.M):
        line = chained.group(0).count("\n")
        raise RecipeError(
            f"{label}:{line}: a second merge begins here, and a recipe is one; save each as a file of its own, "
            "import both, and let the second name the output of the first"
        )
    try:
        document = read_yaml(text)
    except YamlError as error:
        raise RecipeError(f"{label}:{error.line}: {error}") from None
    value = document.value
    if not isinstance(value, dict) or not {"merge_method", *MIXTURES} & set(value):
        raise RecipeError(f"{label}: found no merge_method; expected a file for mergekit-yaml")
    found = MergeFile(label, document)
    for line, keys, message in document.problems:
        raise RecipeError(f"{label}:{line} {'.'.join(map(str, keys))}: {message}")
    if mixture := next((key for key in MIXTURES if key in value), None):
        found.problems.append(((mixture,), "a mixture of experts made of whole models; a recipe makes none"))
        found.check()
    _top(found, value)
    return found


def _top(found: MergeFile, value: dict[str, Any]) -> None:
    """Fills in what stands at the top."""
    found.method = _text(found, ("merge_method",), value.get("merge_method"))
    found.settings = _settings(found, ("parameters",), value.get("parameters"))
    if value.get("base_model") is not None:
        found.base = _model(found, ("base_model",), value["base_model"], {})
    dtype = value.get("out_dtype") or value.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        key = "out_dtype" if value.get("out_dtype") else "dtype"
        found.problems.append(((key,), f"found {describe(dtype)}; expected one of {', '.join(DTYPES)}"))
    found.dtype = dtype
    _tokenizer(found, value)
    if value.get("modules"):
        found.problems.append((("modules",), "merges parts of a model each in its own way; a recipe has one method"))
    elif value.get("slices"):
        found.segments = tuple(_slices(found, value["slices"]))
    else:
        inputs = _inputs(found, ("models",), value.get("models"))
        found.segments = (Segment(0, None, inputs, {}, ("models",)),)
    known = {"merge_method", "parameters", "base_model", "dtype", "out_dtype", "modules", "slices", "models"}
    for key in value:
        if key in SIDE_FILES and value[key] is not None:
            found.notes.append(f"line {found.line((key,))}, {key}: it is that of `finetuned`")
        elif key not in known and key not in ("tokenizer", "tokenizer_source", *SIDE_FILES):
            found.notes.append(f"line {found.line((key,))}, {key}: of no effect on the weights")


def _tokenizer(found: MergeFile, value: Mapping[str, Any]) -> None:
    """Vocabularies may be joined by mergekit; a recipe takes one as it is."""
    for key in ("tokenizer_source", "tokenizer"):
        given = value.get(key)
        keys: Keys = (key,)
        if isinstance(given, dict):
            if given.get("tokens") or given.get("pad_to_multiple_of"):
                found.problems.append((keys, "changes rows of the embeddings token by token; a recipe does not"))
            given, keys = given.get("source"), (key, "source")
        if given == "union":
            found.problems.append((keys, "joins vocabularies; a recipe takes one, see `vocabulary`"))
        elif given is not None:
            found.notes.append(f"line {found.line(keys)}, {key}: it is that of `finetuned`")


def _slices(found: MergeFile, given: Any) -> list[Segment]:
    """Runs of blocks, which have to follow one another from the first block on."""
    segments: list[Segment] = []
    at = 0
    for number, one in enumerate(given if isinstance(given, list) else ()):
        keys: Keys = ("slices", number)
        sources = one.get("sources") if isinstance(one, dict) else None
        if not sources or not isinstance(sources, list):
            found.problems.append((keys, "has no sources; expected a list of models with layer_range"))
            continue
        inputs = _inputs(found, (*keys, "sources"), sources)
        ranges = [source.get("layer_range") if isinstance(source, dict) else None for source in sources]
        whole = [r for r in ranges if isinstance(r, list) and len(r) == 2 and all(type(n) is int for n in r)]
        moved = next((i for i, r in enumerate(ranges) if r not in whole or r[0] != at or r != ranges[0]), None)
        if moved is not None:
            place = (*keys, "sources", moved, "layer_range")
            found.problems.append((place, f"found {ranges[moved]}; expected blocks from {at} on: {_KEEPS}"))
            return segments
        for key in ("base_model", "residual_weight"):
            if one.get(key) is not None and (key != "base_model" or found.base is None):
                found.problems.append(((*keys, key), "is said for some blocks alone; a recipe has one for all"))
        segments.append(
            Segment(at, whole[0][1], inputs, _settings(found, (*keys, "parameters"), one.get("parameters")), keys)
        )
        at = whole[0][1]
    if len({tuple(sorted(map(repr, (i.model for i in one.inputs)))) for one in segments}) > 1:
        found.problems.append((("slices",), f"takes blocks of other models in turn: {_KEEPS}"))
    return segments


_KEEPS = "a recipe keeps every block in its place and leaves none out"


def _inputs(found: MergeFile, keys: Keys, given: Any) -> tuple[Input, ...]:
    if not isinstance(given, list) or not given:
        found.problems.append((keys, f"found {describe(given)}; expected a list of models"))
        return ()
    inputs = []
    for number, one in enumerate(given):
        place = (*keys, number)
        if not isinstance(one, dict):
            found.problems.append((place, f"found {describe(one)}; expected a mapping with model"))
            continue
        settings = _settings(found, (*place, "parameters"), one.get("parameters"))
        if model := _model(found, (*place, "model"), one.get("model"), settings):
            inputs.append(model)
    return tuple(inputs)


def _model(found: MergeFile, keys: Keys, given: Any, settings: Mapping[str, Any]) -> Input | None:
    """A model as text `place@revision+adapter@revision`, or as mergekit's long form."""
    parts = [given]
    if isinstance(given, dict):
        parts = [given.get("model"), given.get("lora")]
    elif isinstance(given, str):
        parts = list(given.split("+", 1))
    told = [f"{p['path']}@{p['revision']}" if isinstance(p, dict) and p.get("revision") else p for p in parts]
    told = [p["path"] if isinstance(p, dict) and isinstance(p.get("path"), str) else p for p in told]
    place, adapter = (*told, None)[:2]
    if not isinstance(place, str) or not isinstance(adapter, str | None) or not place:
        found.problems.append((keys, f"found {describe(given)}; expected a folder or a hub id"))
        return None
    return Input(place, adapter or None, settings, keys)


def _settings(found: MergeFile, keys: Keys, given: Any) -> Mapping[str, Any]:
    """A block of parameters, whose forms are checked here: a value, a gradient, or values for filters."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        found.problems.append((keys, f"found {describe(given)}; expected a mapping of parameters"))
        return {}
    for name, setting in given.items():
        listed = setting if isinstance(setting, list) else [setting]
        for number, one in enumerate(listed):
            place = (*keys, name, number) if isinstance(setting, list) else (*keys, name)
            if isinstance(one, dict):
                values = one.get("value")
                unknown = next((key for key in one if key not in ("value", "filter")), None)
                if unknown is not None or values is None:
                    message = "filter" if unknown else "value and filter"
                    found.problems.append(((*place, unknown or "value"), f"not read by mergekit; expected {message}"))
                elif isinstance(values, list) and not _gradient(values):
                    found.problems.append(((*place, "value"), f"found {describe(values)}; expected numbers"))
            elif isinstance(setting, list) and not _gradient(setting):
                found.problems.append(((*keys, name), "found a list of several kinds; expected values, or filters"))
                break
    return given


def _gradient(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, bool | int | float | str) for value in values)


def _text(found: MergeFile, keys: Keys, given: Any) -> str:
    if not isinstance(given, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,60}", given):
        found.problems.append((keys, f"found {describe(given)}; expected the name of a method"))
        return ""
    return given
