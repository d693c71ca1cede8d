"""`linear`, SafeMERGE's own (arXiv 2503.17239): αΔf + (1−α)Δs. Linear in the weights, so it stays a sum."""

from __future__ import annotations

from typing import ClassVar, Literal

from safemerge_recipes.methods.base import Method, Sides
from safemerge_recipes.methods.factors import blend
from safemerge_recipes.methods.work import Sum
from safemerge_recipes.recipe.merge import Weighted
from safemerge_recipes.recipe.merge_keys import Alpha, AnySpace, SumNormalize
from safemerge_recipes.weights.algebra import total


class Linear(Weighted):
    """αΔf + (1−α)Δs, or Σ weight·Δ."""

    factors: ClassVar[bool] = True
    divides: ClassVar[bool] = True
    method: Literal["linear"] = "linear"
    alpha: Alpha = 0.8
    normalize: SumNormalize = None
    space: AnySpace = "delta"


def work(merge: Linear, sides: Sides) -> Sum:
    """The sum, or that of the products of combined factors with `space: factors`."""
    if merge.space == "factors":
        return Sum(sides.aligned + blend(merge.float_shares(), sides))
    shares = merge.shares()
    origin, deltas = sides.weighed(shares, merge.space)
    return Sum(origin + total(shares.values(), deltas))


LINEAR = Method(
    work,
    keys=Linear,
    formula="αΔf + (1−α)Δs, or Σ weight·Δ",
    needs=("safety",),
    link="https://arxiv.org/abs/2503.17239",
    low_rank=True,
    alike=lambda merge: merge.space != "factors",
)
