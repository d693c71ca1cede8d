"""`task_arithmetic` (arXiv 2212.04089): lambda_finetuned·Δf + lambda_safety·Δs."""

from __future__ import annotations

from safemerge_recipes.methods.base import Method, Sides, Sum, always
from safemerge_recipes.recipe.merge import TaskArithmetic


def work(merge: TaskArithmetic, sides: Sides) -> Sum:
    """The sum."""
    origin, x, y = sides.pair(merge.space)
    return Sum(origin + (merge.lambda_finetuned * x + merge.lambda_safety * y))


TASK_ARITHMETIC = Method(work, alike=always)
