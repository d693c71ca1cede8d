"""`dare_ties` (arXiv 2311.03099): Δf and Δs dropped at random and rescaled, then elected; the kernel is in `dare`."""

from __future__ import annotations

from typing import Literal

from safemerge_recipes.methods.base import Method, Sides, always
from safemerge_recipes.methods.dare import dare_kernel
from safemerge_recipes.methods.ties import consensus
from safemerge_recipes.methods.work import Apply
from safemerge_recipes.recipe.merge import Weighted
from safemerge_recipes.recipe.merge_keys import Alpha, Density, DrawSeed, Lambda, Normalize, Rescale, Space
from safemerge_recipes.weights.draw import Draw


class DareTies(Weighted):
    """Random elements of each side, where their signs agree."""

    method: Literal["dare_ties"]
    alpha: Alpha = 0.8
    density: Density = 0.5
    lambda_: Lambda = 1.0
    normalize: Normalize = True
    rescale: Rescale = "density"
    seed: DrawSeed = 0
    space: Space = "delta"


def elected(merge: DareTies, sides: Sides) -> Apply:
    """The consensus of what stays."""
    origin, deltas = sides.weighed(merge.shares(), merge.space)
    then = consensus(merge, merge.normalize, merge.lambda_)
    return Apply(origin, deltas, dare_kernel(merge, Draw(merge.density, merge.seed), merge.rescale, then))


DARE_TIES = Method(
    elected,
    keys=DareTies,
    formula="Δf and Δs dropped at random to `density` and rescaled, then signs elected as in `ties`",
    needs=("safety",),
    link="https://arxiv.org/abs/2311.03099",
    alike=always,
)
