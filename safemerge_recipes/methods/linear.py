"""`linear`, SafeMERGE's own (arXiv 2503.17239): αΔf + (1−α)Δs. Linear in the weights, so it stays a sum."""

from __future__ import annotations

from safemerge_recipes.methods.base import Method, Sides, Sum
from safemerge_recipes.methods.factors import blend
from safemerge_recipes.recipe.merge import Linear
from safemerge_recipes.weights.algebra import exact


def work(merge: Linear, sides: Sides) -> Sum:
    """The sum, or that of the products of combined factors with `space: factors`."""
    if merge.space == "factors":
        return Sum(sides.aligned + blend(merge.alpha, sides))
    origin, x, y = sides.pair(merge.space)
    alpha = exact(merge.alpha)
    return Sum(origin + (alpha * x + (1 - alpha) * y))


LINEAR = Method(work, alike=lambda merge: merge.space != "factors")
