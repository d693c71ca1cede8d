"""`task_arithmetic` (arXiv 2212.04089): lambda_finetuned·Δf + lambda_safety·Δs."""

from __future__ import annotations

from typing import Literal

from safemerge_recipes.methods.base import Method, Sides, always
from safemerge_recipes.methods.work import Sum
from safemerge_recipes.recipe.fields import Weight
from safemerge_recipes.recipe.merge import Merge
from safemerge_recipes.recipe.merge_keys import Space


class TaskArithmetic(Merge):
    """A sum with factors of one's own."""

    method: Literal["task_arithmetic"]
    lambda_finetuned: Weight = 1.0
    """Factor of Δf (`task_arithmetic`)."""
    lambda_safety: Weight = 1.0
    """Factor of Δs (`task_arithmetic`)."""
    space: Space = "delta"


def work(merge: TaskArithmetic, sides: Sides) -> Sum:
    """The sum."""
    origin, x, y = sides.pair(merge.space)
    return Sum(origin + (merge.lambda_finetuned * x + merge.lambda_safety * y))


TASK_ARITHMETIC = Method(
    work,
    keys=TaskArithmetic,
    formula="lambda_finetuned·Δf + lambda_safety·Δs",
    needs=("safety",),
    link="https://arxiv.org/abs/2212.04089",
    low_rank=True,
    alike=always,
)
