"""A merge method: the fine-tuned update with its elements limited in size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safemerge_recipes.plugins import Apply, Arena, Custom, Kernel, Method, Pieces, RecipeError, Sides

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Clip(Kernel):
    """Elements beyond ±limit times the root mean square of x become ±that."""

    limit: float

    def scan(self, name: str, numel: int, pieces: Pieces, arena: Arena) -> float:
        """The largest size that stays: one pass over the update."""
        square = sum(float((x.double() ** 2).sum()) for _, x in pieces())
        return self.limit * (square / numel) ** 0.5

    def apply(self, bound: float, start: int, x: torch.Tensor, arena: Arena) -> torch.Tensor:
        """The clipped piece."""
        return x.clamp_(-bound, bound)


def _work(merge: Custom, sides: Sides) -> Apply:
    limit = merge.options.get("limit")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0:
        raise RecipeError(f"merge.options.limit: found {limit!r}; expected a number above 0")
    return Apply(sides.aligned, (sides.delta,), Clip(float(limit)))


CLIP = Method(_work)
