"""Masks and scores made elsewhere: a safetensors file with a value for every element of a tensor.

The header is read with the sources', the values block by block with the weights. What is masked is replaced:
by the safety or the aligned weight, or by 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safemerge_recipes.errors import SourceError
from safemerge_recipes.methods.kernels import Blocks
from safemerge_recipes.recipe.model import Recipe
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.storage.safetensors import TensorRef, read_header

if TYPE_CHECKING:
    import torch

MASK_DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64")
"""Dtypes a mask may be stored as."""


def open_masks(recipe: Recipe, directory: Path) -> dict[str, Mapping[str, TensorRef]]:
    """The tensors of every mask file of a recipe, by the path as the recipe writes it. Reads headers only.

    Raises:
        SourceError: a file is missing or unsound.
    """
    found: dict[str, Mapping[str, TensorRef]] = {}
    for policy in recipe.policies():
        mask = policy.merge.mask
        if policy.keep is None and mask is not None and mask.path not in found:
            found[mask.path] = read_header(mask_path(directory, mask.path))
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


@dataclass(frozen=True, slots=True)
class Replace:
    """Elements of x are replaced by y's: where the mask is above `threshold`, or, without one, by its share.

    Without a threshold the mask holds 0 (keep) to 1 (replace), and in between mixes: (1−m)·x + m·y, exact at
    both ends. `invert` takes 1 − m, or what is not above the threshold.
    """

    threshold: float | None
    invert: bool

    def scan(self, name: str, numel: int, blocks: Blocks, arena: Arena) -> str:
        """The tensor's name; no pass is needed."""
        return name

    def apply(
        self, name: str, start: int, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor, arena: Arena
    ) -> torch.Tensor:
        """The block with what is masked replaced.

        Raises:
            SourceError: the mask holds NaN, or without a threshold values outside 0 to 1.
        """
        import torch

        if self.threshold is not None:
            if bool(mask.isnan().any()):
                raise SourceError(f"{name}: the mask holds NaN; expected a score for every element")
            replaced = mask > self.threshold
            return torch.where(~replaced if self.invert else replaced, y, x)
        low, high = (float(end) for end in mask.aminmax())
        if not (low >= 0 and high <= 1):
            raise SourceError(
                f"{name}: the mask holds values from {low:g} to {high:g}; expected 0 (keep) to 1 (replace), "
                "or a merge.mask.threshold for scores"
            )
        return torch.lerp(x, y, mask.neg_().add_(1) if self.invert else mask, out=x)
