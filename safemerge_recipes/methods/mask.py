"""`mask`: elements named by a file made elsewhere are replaced by the safety or the aligned weight, or by 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safemerge_recipes.errors import SourceError
from safemerge_recipes.methods.base import Apply, Kernel, Method, Sides
from safemerge_recipes.recipe.merge import Mask
from safemerge_recipes.sources.masks import mask_ref
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights.algebra import Stored, Weight

if TYPE_CHECKING:
    import torch


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


MASK = Method(work)
