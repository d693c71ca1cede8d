"""`drop`: the aligned weight, no Δ at all; what a merge is compared with."""

from __future__ import annotations

from typing import Literal

from safemerge_recipes.methods.base import Method, Sides, always
from safemerge_recipes.methods.work import Sum
from safemerge_recipes.recipe.merge import Merge


class Drop(Merge):
    """No Δ: the aligned weight."""

    method: Literal["drop"]


def dropped(merge: Drop, sides: Sides) -> Sum:
    """W_a."""
    return Sum(sides.aligned)


DROP = Method(dropped, keys=Drop, formula="0", low_rank=True, alike=always)
