"""`linear`, SafeMERGE's own (arXiv 2503.17239): αΔf + (1−α)Δs. Linear in the weights, so it stays a sum."""

from __future__ import annotations

from typing import ClassVar, Literal

from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.factors import blend
from safemerge_recipes.methods.work import Sum
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_keys import Alpha, AnySpace
from safemerge_recipes.weights.algebra import exact


class Linear(Merge):
    """αΔf + (1−α)Δs."""

    factors: ClassVar[bool] = True
    method: Literal["linear"] = "linear"
    alpha: Alpha = 0.8
    space: AnySpace = "delta"


def work(merge: Linear, sides: Sides) -> Sum:
    """The sum, or that of the products of combined factors with `space: factors`."""
    if merge.space == "factors":
        return Sum(sides.aligned + blend(merge.alpha, sides))
    origin, x, y = sides.pair(merge.space)
    alpha = exact(merge.alpha)
    return Sum(origin + (alpha * x + (1 - alpha) * y))


LINEAR = Method(
    work,
    keys=Linear,
    formula="αΔf + (1−α)Δs",
    needs=("safety",),
    link="https://arxiv.org/abs/2503.17239",
    low_rank=True,
    alike=lambda merge: merge.space != "factors",
)
