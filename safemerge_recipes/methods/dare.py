"""The kernel of `dare_linear` and `dare_ties`: deltas dropped at random and rescaled, then summed or elected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safemerge_recipes.methods.branchless import zero_where_dropped
from safemerge_recipes.methods.kernel import CompiledKernel, Pieces
from safemerge_recipes.methods.ties import Consensus
from safemerge_recipes.recipe.merge import Weighted
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.draw import Draw

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.methods.compiled_tensor import Tensor


@dataclass(frozen=True, slots=True)
class DareKernel(CompiledKernel):
    """DARE on all deltas, then their weighted sum (`then` None) or their consensus."""

    draw: Draw
    l1: bool
    weights: tuple[float, ...]
    then: Consensus | None

    def scan(self, name: str, numel: int, pieces: Pieces, arena: Arena) -> tuple[str, list[float]]:
        """(tensor name, what each side is multiplied by)."""
        sums = [(0.0, 0.0)] * len(self.weights)
        for start, *sides in pieces() if self.l1 else ():
            kept = self.draw.keep(name, start, sides[0].numel(), arena, len(sides))
            for place, (piece, keep) in enumerate(zip(sides, kept, strict=True)):
                size = piece.abs().double()
                whole = sums[place][0] + float(size.sum())
                sums[place] = whole, sums[place][1] + float(zero_where_dropped(size, keep).sum())
        return name, self.rescaling(sums)

    def rescaling(self, sums: Sequence[tuple[float, float]]) -> list[float]:
        """What each side is multiplied by; where l1 asks for it, from its sums of all and of the kept magnitudes."""
        if not self.l1:
            return [self.draw.rescale] * len(self.weights)
        return [whole / kept if kept else 0.0 for whole, kept in sums]

    def apply(self, state: tuple[str, list[float]], start: int, *given: Any) -> torch.Tensor:
        """Drop, rescale, merge."""
        *sides, arena = given
        name, scales = state
        for x, keep in zip(sides, self.draw.keep(name, start, sides[0].numel(), arena, len(sides)), strict=True):
            zero_where_dropped(x, keep)
        if self.then is not None:
            return self.then([x.mul_(scale) for x, scale in zip(sides, scales, strict=True)], arena)
        first, *rest = sides
        merged: torch.Tensor = first.mul_(self.weights[0] * scales[0])
        for x, weight, scale in zip(rest, self.weights[1:], scales[1:], strict=True):
            merged.add_(x, alpha=weight * scale)
        return merged

    def set_up(self, tensor: Tensor) -> None:
        """The draws and the rescaling; a pass over the magnitudes where l1 asks for them."""
        sides = len(self.weights)
        tensor.merge.method = compiled.DARE_LINEAR if self.then is None else compiled.DARE_TIES
        keys = (self.draw.key(tensor.name, pair) for pair in range((sides + 1) // 2))
        tensor.draw([compiled.Draw(*key, self.draw.limit) for key in keys])
        scales = self.rescaling(tensor.sizes() if self.l1 else ())
        if self.then is None:
            tensor.share([weight * scale for weight, scale in zip(self.weights, scales, strict=True)])
        else:
            tensor.share(self.then.weights)
            tensor.scale(scales)
            tensor.merge.consensus = self.then.compiled


def dare_kernel(merge: Weighted, draw: Draw, rescale: str, then: Consensus | None = None) -> DareKernel:
    """The kernel for a merge's shares: what is drawn, what makes up for the rest, and what follows (None: the sum)."""
    return DareKernel(draw, rescale == "l1", tuple(float(share) for share in merge.shares().values()), then)
