"""Masks and scores: safetensors files with a value for every element of a tensor, read with the sources.

Headers only; the values are read block by block with the weights. A file that `safemerge score` wrote says which models
it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safemerge_recipes.errors import SourceError
from safemerge_recipes.recipe.model import Recipe
from safemerge_recipes.storage.identity import FileIdentity
from safemerge_recipes.storage.safetensors import Header, TensorRef, open_header

MASK_DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64")
"""Dtypes a mask may be stored as."""

RECORD = "safemerge_score"
"""The metadata of a score file in which `safemerge score` says, as JSON, how it was made."""


def open_masks(recipe: Recipe, directory: Path) -> dict[str, Header]:
    """Every mask file of a recipe, by the path as the recipe writes it. Reads headers only.

    Raises:
        SourceError: a file is missing or unsound.
    """
    found: dict[str, Header] = {}
    for policy in recipe.policies():
        for path in policy.merge.mask_files if policy.keep is None else ():
            if path not in found:
                found[path] = open_header(mask_path(directory, path))
    return found


def check_masks(masks: Mapping[str, Header], behind: Mapping[str, Iterable[FileIdentity]]) -> None:
    """Refuses score files that were made from other models than the recipe's.

    Args:
        masks: every mask file, by the path as the recipe writes it.
        behind: the weight files behind each role.

    Raises:
        SourceError: a file says that it was made from another model.
    """
    for path, header in masks.items():
        for role, written in made_from(header).items():
            if role in behind and written != mark_of(behind[role]):
                raise SourceError(
                    f"merge.mask.path: {path}: was made from another {role} model than the recipe's; expected scores "
                    "of the same files, try `safemerge score` again"
                )


def made_from(header: Header) -> dict[str, str]:
    """The mark of the model of each role that a score file was made from; empty for one made elsewhere."""
    try:
        found = json.loads(header.metadata.get(RECORD, "{}")).get("models", {})
        return {str(role): str(mark) for role, mark in found.items()}
    except (ValueError, AttributeError, RecursionError):
        return {}


def mark_of(files: Iterable[FileIdentity]) -> str:
    """What tells the weight files of a model from others', at little cost: sizes and contents of all, hashed."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(repr(sorted((one.size, one.content) for one in files)).encode())


def mask_path(directory: Path, path: str) -> Path:
    """The absolute form of a mask's path; relative ones start at the recipe's folder."""
    return directory / Path(path).expanduser()


def mask_ref(masks: Mapping[str, Mapping[str, TensorRef]], path: str, name: str, shape: tuple[int, ...]) -> TensorRef:
    """The mask of one tensor.

    Raises:
        SourceError: the file has none, or one of another shape or of no usable dtype.
    """
    ref = masks[path].get(name)
    if ref is None:
        close = next(iter(masks[path]), None)
        raise SourceError(
            f"merge.mask.path: {path}: has no tensor {name!r}; expected one of that name and of shape {shape}"
            + (f" (it has {len(masks[path])}, such as {close!r})" if close else "")
        )
    if ref.shape != shape:
        raise SourceError(
            f"merge.mask.path: {path}: {name} is {ref.shape}, the weight is {shape}; expected a value for every element"
        )
    if ref.dtype not in MASK_DTYPES:
        raise SourceError(
            f"merge.mask.path: {path}: {name} is stored as {ref.dtype}; expected {', '.join(MASK_DTYPES)}"
        )
    return ref
