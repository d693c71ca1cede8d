"""`dare_linear`, `dare_ties` (arXiv 2311.03099): Δf and Δs dropped at random and rescaled, then summed or elected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from safemerge_recipes.methods.base import Method, Sides, always
from safemerge_recipes.methods.branchless import zero_where_dropped
from safemerge_recipes.methods.factors import blend
from safemerge_recipes.methods.kernel import CompiledKernel, Pieces
from safemerge_recipes.methods.ties import Consensus, consensus
from safemerge_recipes.methods.work import Apply, Sum
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_keys import Alpha, AnySpace, Density, DrawSeed, Lambda, Normalize, Rescale, Space
from safemerge_recipes.storage.arena import Arena
from safemerge_recipes.weights import compiled
from safemerge_recipes.weights.algebra import exact
from safemerge_recipes.weights.draw import Draw

if TYPE_CHECKING:
    import torch

    from safemerge_recipes.methods.compiled_tensor import Tensor


class DareLinear(Merge):
    """Random elements of each side, then their weighted sum."""

    factors: ClassVar[bool] = True
    method: Literal["dare_linear"]
    alpha: Alpha = 0.8
    density: Density = 0.5
    rescale: Rescale = "density"
    seed: DrawSeed = 0
    space: AnySpace = "delta"

    @field_validator("space")
    @classmethod
    def _as_peft(cls, space: str, info: ValidationInfo) -> str:
        if space == "factors" and info.data.get("rescale") == "l1":
            raise ValueError("found factors with rescale l1; expected rescale density, as PEFT does")
        return space


class DareTies(Merge):
    """Random elements of each side, where their signs agree."""

    method: Literal["dare_ties"]
    alpha: Alpha = 0.8
    density: Density = 0.5
    lambda_: Lambda = 1.0
    normalize: Normalize = True
    rescale: Rescale = "density"
    seed: DrawSeed = 0
    space: Space = "delta"


@dataclass(frozen=True, slots=True)
class DareKernel(CompiledKernel):
    """DARE on both deltas, then their weighted sum (`then` None) or their consensus."""

    draw: Draw
    l1: bool
    weights: tuple[float, float]
    then: Consensus | None

    def scan(self, name: str, numel: int, pieces: Pieces, arena: Arena) -> tuple[str, float, float]:
        """(tensor name, rescaling of x, rescaling of y)."""
        sums = [0.0, 0.0, 0.0, 0.0]
        if self.l1:
            for start, *pair in pieces():
                kept = self.draw.keep(name, start, pair[0].numel(), arena)
                for side, (piece, keep) in enumerate(zip(pair, kept, strict=True)):
                    size = piece.abs().double()
                    sums[2 * side] += float(size.sum())
                    sums[2 * side + 1] += float(zero_where_dropped(size, keep).sum())
        return name, *self.rescaling(*sums)

    def rescaling(self, x: float, kept_x: float, y: float, kept_y: float) -> tuple[float, float]:
        """What x and y are multiplied by, from the sums of all and of the kept magnitudes, where l1 asks for them."""
        if not self.l1:
            return self.draw.rescale, self.draw.rescale
        return x / kept_x if kept_x else 0.0, y / kept_y if kept_y else 0.0

    def apply(
        self, state: tuple[str, float, float], start: int, x: torch.Tensor, y: torch.Tensor, arena: Arena
    ) -> torch.Tensor:
        """Drop, rescale, merge."""
        name, scale_x, scale_y = state
        keep_x, keep_y = self.draw.keep(name, start, x.numel(), arena)
        zero_where_dropped(x, keep_x)
        zero_where_dropped(y, keep_y)
        if self.then is None:
            return x.mul_(self.weights[0] * scale_x).add_(y, alpha=self.weights[1] * scale_y)
        return self.then(x.mul_(scale_x), y.mul_(scale_y), arena)

    def set_up(self, tensor: Tensor) -> None:
        """The draw and the rescaling; a pass over the magnitudes where l1 asks for them."""
        merge = tensor.merge
        merge.method = compiled.DARE_LINEAR if self.then is None else compiled.DARE_TIES
        merge.draw = compiled.Draw(*self.draw.key(tensor.name), self.draw.limit)
        scales = self.rescaling(*(tensor.sizes() if self.l1 else (0.0, 0.0, 0.0, 0.0)))
        if self.then is None:
            merge.a, merge.b = (weight * scale for weight, scale in zip(self.weights, scales, strict=True))
        else:
            merge.scales[0], merge.scales[1], merge.consensus = *scales, self.then.compiled


def _kernel(merge: DareLinear | DareTies, then: Consensus | None) -> DareKernel:
    alpha = exact(merge.alpha)
    weights = float(alpha), float(1 - alpha)
    return DareKernel(Draw(merge.density, merge.seed), merge.rescale == "l1", weights, then)


def summed(merge: DareLinear, sides: Sides) -> Apply | Sum:
    """The sum of what stays, or that of the products of thinned factors with `space: factors`."""
    if merge.space == "factors":
        return Sum(sides.aligned + blend(merge.alpha, sides, (merge.density, merge.seed, sides.name)))
    origin, x, y = sides.pair(merge.space)
    return Apply(origin, (x, y), _kernel(merge, None))


def elected(merge: DareTies, sides: Sides) -> Apply:
    """The consensus of what stays."""
    origin, x, y = sides.pair(merge.space)
    return Apply(origin, (x, y), _kernel(merge, consensus(merge.alpha, merge.normalize, merge.lambda_)))


DARE_LINEAR = Method(
    summed,
    keys=DareLinear,
    formula="Δf and Δs dropped at random to `density` and rescaled, then as `linear`",
    needs=("safety",),
    link="https://arxiv.org/abs/2311.03099",
    alike=lambda merge: merge.space != "factors",
)
DARE_TIES = Method(
    elected,
    keys=DareTies,
    formula="Δf and Δs dropped at random to `density` and rescaled, then signs elected as in `ties`",
    needs=("safety",),
    link="https://arxiv.org/abs/2311.03099",
    alike=always,
)
