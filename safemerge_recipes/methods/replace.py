"""`replace`: Δs in place of Δf; what a merge is compared with."""

from __future__ import annotations

from typing import Literal

from safemerge_recipes.methods.base import Method, Sides, always
from safemerge_recipes.methods.work import Sum
from safemerge_recipes.recipe.merge import Merge


class Replace(Merge):
    """Δs in place of Δf."""

    method: Literal["replace"]


def replaced(merge: Replace, sides: Sides) -> Sum:
    """W_a + Δs."""
    return Sum(sides.aligned + sides.safety_delta)


REPLACE = Method(replaced, keys=Replace, formula="Δs", needs=("safety",), low_rank=True, alike=always)
