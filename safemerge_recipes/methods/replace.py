"""`replace`, Δs in place of Δf, and `drop`, the aligned weight: what a merge is compared with."""

from __future__ import annotations

from safemerge_recipes.methods.base import Method, Sides, Sum, always
from safemerge_recipes.recipe.merge import Drop, Replace


def replaced(merge: Replace, sides: Sides) -> Sum:
    """W_a + Δs."""
    return Sum(sides.aligned + sides.safety_delta)


def dropped(merge: Drop, sides: Sides) -> Sum:
    """W_a."""
    return Sum(sides.aligned)


REPLACE = Method(replaced, alike=always)
DROP = Method(dropped, alike=always)
