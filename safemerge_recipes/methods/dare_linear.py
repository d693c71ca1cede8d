"""`dare_linear` (arXiv 2311.03099): Δf and Δs dropped at random and rescaled, then summed; the kernel is in `dare`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.dare import dare_kernel
from safemerge_recipes.methods.factors import blend
from safemerge_recipes.methods.work import Apply, Sum
from safemerge_recipes.recipe.merge import Weighted
from safemerge_recipes.recipe.merge_keys import Alpha, AnySpace, Density, DrawSeed, Rescale, SumNormalize
from safemerge_recipes.weights.draw import Draw


class DareLinear(Weighted):
    """Random elements of each side, then their weighted sum."""

    factors: ClassVar[bool] = True
    divides: ClassVar[bool] = True
    method: Literal["dare_linear"]
    alpha: Alpha = 0.8
    density: Density = 0.5
    normalize: SumNormalize = None
    rescale: Rescale = "density"
    seed: DrawSeed = 0
    space: AnySpace = "delta"

    @field_validator("space")
    @classmethod
    def _as_peft(cls, space: str, info: ValidationInfo) -> str:
        if space == "factors" and info.data.get("rescale") == "l1":
            raise ValueError("found factors with rescale l1; expected rescale density, as PEFT does")
        return space


def summed(merge: DareLinear, sides: Sides) -> Apply | Sum:
    """The sum of what stays, or that of the products of thinned factors with `space: factors`."""
    if merge.space == "factors":
        return Sum(sides.aligned + blend(merge.float_shares(), sides, (merge.density, merge.seed, sides.name)))
    origin, deltas = sides.weighed(merge.shares(), merge.space)
    return Apply(origin, deltas, dare_kernel(merge, Draw(merge.density, merge.seed), merge.rescale))


DARE_LINEAR = Method(
    summed,
    keys=DareLinear,
    formula="Δf and Δs dropped at random to `density` and rescaled, then as `linear`",
    needs=("safety",),
    link="https://arxiv.org/abs/2311.03099",
    alike=lambda merge: merge.space != "factors",
)
