"""`mask`: elements named by a file made elsewhere are replaced by the safety or the aligned weight, or by 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safemerge_recipes.errors import SourceError
from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.kernel import Kernel
from safemerge_recipes.methods.work import Apply
from safemerge_recipes.recipe.builtins import Role
from safemerge_recipes.recipe.fields import Strict, Text
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.sources.masks import mask_ref
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.algebra import Stored, Weight

if TYPE_CHECKING:
    import torch


class MaskFile(Strict):
    """A mask or score of every element, made elsewhere."""

    path: Text
    """A safetensors file with a tensor of the same name and shape for every merged tensor."""
    threshold: float | None = None
    """Elements with a value above it are replaced. null: the file holds 0 (keep) to 1 (replace); values in
    between mix."""
    invert: bool = False
    """Replace the other elements instead."""
    fill: Literal["safety", "aligned", "zero"] = "safety"
    """What replaced elements become: the safety or the aligned weight, or 0."""


class Mask(Merge):
    """Elements named by a file are replaced."""

    method: Literal["mask"]
    mask: MaskFile
    """The elements to replace (`mask`)."""

    def needs(self) -> tuple[Role, ...]:
        """What fills the elements."""
        return ("safety",) if self.mask.fill == "safety" else ()

    @property
    def mask_file(self) -> str:
        """The mask."""
        return self.mask.path


@dataclass(frozen=True, slots=True)
class Masked(Kernel):
    """Elements of x are replaced by y's: where the mask is above `threshold`, or, without one, by its share.

    Without a threshold the mask holds 0 (keep) to 1 (replace), and in between mixes: (1−m)·x + m·y, exact at
    both ends. `invert` takes 1 − m, or what is not above the threshold.
    """

    threshold: float | None
    invert: bool

    def apply(
        self, name: str, start: int, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor, arena: Arena
    ) -> torch.Tensor:
        """The piece with what is masked replaced.

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


def work(merge: Mask, sides: Sides) -> Apply:
    """W_f with what is masked replaced."""
    ref = mask_ref(sides.masks, merge.mask.path, sides.name, sides.shape)
    fills: Mapping[str, Callable[[], Weight]] = {
        "safety": lambda: sides.need("safety"),
        "aligned": lambda: sides.aligned,
        "zero": Weight,
    }
    inputs = (sides.finetuned, fills[merge.mask.fill](), Weight.of(Stored(ref)))
    return Apply(Weight(), inputs, Masked(merge.mask.threshold, merge.mask.invert))


MASK = Method(work, keys=Mask, formula="Δf, with the masked elements replaced")
