"""A model folder seen through its headers: which tensors it holds and where. Reads no weights.

Works on the names on disk, as the hub's checkpoints have them, and keeps no table of architectures: the
folder's own inventory is the only authority on what a model consists of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemerge_recipes.errors import SourceError
from safemerge_recipes.sources.hub import Away
from safemerge_recipes.sources.instead import instead
from safemerge_recipes.sources.mirror import is_there, weight_path
from safemerge_recipes.sources.model_config import setting
from safemerge_recipes.storage.files import content_of, reading
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.layout import INDEX_FILE, SINGLE_FILE
from safemerge_recipes.storage.safetensors import MAX_VALUES, TensorRef, check_values, open_header

MAX_JSON_BYTES = 16_000_000
"""Largest config or index read, in bytes: an index of 100 000 tensors stays below it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of safetensors: `tensors` by name in file order, `config` as parsed from config.json.

    `identities` are those of its weight files, as they were when their headers were read.
    """

    directory: Path
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    identities: tuple[FileIdentity, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Its weight files."""
        return tuple(one.path for one in self.identities)

    @property
    def tied(self) -> bool:
        """Whether the config ties the output head to the input embedding (transformers' default is yes)."""
        tied = setting(self.config, "tie_word_embeddings")
        return True if tied is None else bool(tied)


def read_json(path: Path, limit: int = MAX_JSON_BYTES, values: int = MAX_VALUES) -> Any:
    """The content of a JSON file. Raises SourceError when it is missing, huge, or not JSON."""
    try:
        text = content_of(path, limit)
        check_values(text, values)
        return json.loads(text.decode("utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; expected a JSON file there") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON: {str(error)[:200]}; expected an intact file") from None


def read_object(path: Path, limit: int = MAX_JSON_BYTES, values: int = MAX_VALUES) -> dict[str, Any]:
    """Like `read_json`, for files that must hold a JSON object."""
    value = read_json(path, limit, values)
    if not isinstance(value, dict):
        raise SourceError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def same_bytes(one: TensorRef, other: TensorRef) -> bool:
    """Whether two stored tensors are equal byte for byte. Reads up to the first difference, 4 MiB at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        with reading(one.path) as left, reading(other.path) as right:
            left.seek(one.offset)
            right.seek(other.offset)
            for done in range(0, one.nbytes, 1 << 22):
                count = min(1 << 22, one.nbytes - done)
                if left.read(count) != right.read(count):
                    return False
    except OSError as error:
        raise SourceError(f"{one.path}: {error.strerror}; it was readable a moment ago") from None
    return True


def _weight_files(directory: Path, away: Mapping[str, Away]) -> tuple[list[str], Mapping[str, str] | None]:
    if SINGLE_FILE in away or is_there(weight_path(directory, SINGLE_FILE)):
        return [SINGLE_FILE], None
    if (directory / INDEX_FILE).exists():
        weight_map = _weight_map(directory)
        return sorted(set(weight_map.values())), weight_map
    raise SourceError(f"{directory}: {instead(directory, sorted(path.name for path in directory.iterdir()))}")


def named_files(directory: Path, index: str = INDEX_FILE) -> list[str]:
    """The weight files that a folder's index names. Raises SourceError where it is not usable."""
    return sorted(set(_weight_map(directory, index).values()))


def _weight_map(directory: Path, name: str = INDEX_FILE) -> dict[str, str]:
    index = directory / name
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SourceError(f"{index}: has no usable weight_map; expected tensor names mapped to file names")
    for file in weight_map.values():
        if not file.endswith(".safetensors"):
            raise SourceError(f"{index}: names {file[:200]!r}; expected files that end in .safetensors")
    return weight_map


def open_checkpoint(directory: Path, away: Mapping[str, Away] | None = None) -> Checkpoint:
    """The inventory of a model folder.

    Args:
        directory: the folder.
        away: weight files that are still on the hub: of them the headers are read.

    Raises:
        SourceError: weights or config are missing or unsound, or the index and the files disagree.
    """
    away = away or {}
    bare = not (directory / "config.json").exists()  # then what lies there instead of a model says more
    names, weight_map = _weight_files(directory, away) if bare else ([], None)
    config = read_object(directory / "config.json")
    names, weight_map = (names, weight_map) if bare else _weight_files(directory, away)
    tensors: dict[str, TensorRef] = {}
    identities = []
    for file in names:
        path = away[file].header if file in away else weight_path(directory, file)
        if not is_there(path):
            raise SourceError(f"{directory}: {INDEX_FILE} names {file[:200]!r}, which is missing; download it again")
        header = open_header(path, away[file].size if file in away else None)
        identities.append(header.identity)
        for name, ref in header.tensors.items():
            if name in tensors:
                raise SourceError(f"{path}: {name!r} is also in {tensors[name].path}; expected it once")
            if weight_map is not None and weight_map.get(name) != file:
                raise SourceError(f"{path}: holds {name!r}, which {INDEX_FILE} does not place there")
            tensors[name] = ref
    if weight_map is not None and len(weight_map) != len(tensors):
        missing = sorted(set(weight_map) - set(tensors))
        raise SourceError(
            f"{directory}: {INDEX_FILE} names {missing[0][:200]!r}, which no file holds ({len(missing)} such)"
        )
    if not tensors:
        raise SourceError(f"{directory}: its weight files hold no tensor")
    return Checkpoint(directory, tensors, config, tuple(identities))
