"""config.json of a model: what it says, and what a merged one must say differently.

Every other byte of the file stays as it was. Knows nothing of tensors but what it is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from safemerge_recipes.storage.dtypes import DTYPES, FLOAT_DTYPES


class Removed(Enum):
    """The value of an edit that takes a key away."""

    REMOVED = "removed"


REMOVED = Removed.REMOVED


@dataclass(frozen=True, slots=True)
class Added:
    """The value of an edit that puts further entries into a list, wherever the key stands."""

    entries: tuple[str, ...]


DTYPE_KEYS = ("dtype", "torch_dtype")
_SCALAR = r'(?:true|false|null|-?\d+|"(?:[^"\\]|\\.)*")'


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A value of config.json, from its `text_config` where a multimodal model keeps it there; None if unsaid."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and every config in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def dtype_edits(config: Mapping[str, Any], nbytes: Mapping[str, int]) -> dict[str, Any]:
    """What must change for the config to name the dtype of the weights, which is the one readers load them as.

    Args:
        config: the model's config.json.
        nbytes: bytes of the float weights by safetensors dtype; the greatest part decides.
    """
    known = {dtype: count for dtype, count in nbytes.items() if dtype in FLOAT_DTYPES}
    if not known:
        return {}
    name = DTYPES[max(known, key=lambda dtype: known[dtype])].torch
    said = {key for part in _parts(config) for key in DTYPE_KEYS if part.get(key) not in (None, name)}
    return {key: name for key in DTYPE_KEYS if key in said}


def edited(content: bytes, edits: Mapping[str, Any]) -> bytes:
    """A config.json with some values changed wherever they stand, and every other byte as it was.

    Where a key is taken away, or its value is no scalar, the file is written anew, two spaces a level, keys in their
    order.
    """
    text = content.decode("utf-8")
    anew = {key: value for key, value in edits.items() if value is REMOVED or isinstance(value, Added | dict)}
    for key, value in edits.items():
        if key in anew:
            continue
        new = json.dumps(value)
        text, count = re.subn(rf'("{key}"\s*:\s*){_SCALAR}', rf"\g<1>{new}", text)
        if not count:
            text = text.replace("{", f'{{\n  "{key}": {new},', 1)
    if anew:
        config = json.loads(text)  # as sound as it was
        absent = {key: value for key, value in anew.items() if isinstance(value, dict) and not _holds(config, key)}
        text = json.dumps({**_changed(config, anew), **absent}, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8")


def _holds(config: Mapping[str, Any], key: str) -> bool:
    return any(key in part for part in _parts(config))


def _changed(value: Any, edits: Mapping[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, part in value.items():
        edit = edits.get(key)
        if edit is REMOVED:
            continue
        if isinstance(edit, Added) and isinstance(part, list):
            found[key] = list(dict.fromkeys((*part, *edit.entries)))
        else:
            found[key] = edit if isinstance(edit, dict) else _changed(part, edits)
    return found
