"""Masks and scores made elsewhere: safetensors files with a value for every element of a tensor, read with the sources.

Headers only; the values are read block by block with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safemerge_recipes.errors import SourceError
from safemerge_recipes.recipe.model import Recipe
from safemerge_recipes.storage.safetensors import TensorRef, read_header

MASK_DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64")
"""Dtypes a mask may be stored as."""


def open_masks(recipe: Recipe, directory: Path) -> dict[str, Mapping[str, TensorRef]]:
    """The tensors of every mask file of a recipe, by the path as the recipe writes it. Reads headers only.

    Raises:
        SourceError: a file is missing or unsound.
    """
    found: dict[str, Mapping[str, TensorRef]] = {}
    for policy in recipe.policies():
        path = policy.merge.mask_file
        if policy.keep is None and path is not None and path not in found:
            found[path] = read_header(mask_path(directory, path))
    return found


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
