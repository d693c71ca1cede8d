"""Masks and scores made elsewhere: the elements they name are replaced by the safety or the aligned weight, or by 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safemerge_recipes.errors import SourceError
from safemerge_recipes.methods.kernels import Blocks
from safemerge_recipes.storage.arena import Arena

if TYPE_CHECKING:
    import torch


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
