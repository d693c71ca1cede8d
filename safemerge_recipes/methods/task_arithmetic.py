"""`task_arithmetic` (arXiv 2212.04089): lambda_finetuned·Δf + lambda_safety·Δs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from safemerge_recipes.methods.base import Method, Sides, always
from safemerge_recipes.methods.work import Sum
from safemerge_recipes.recipe.merge import Weighted
from safemerge_recipes.recipe.merge_keys import Gradient, Share, Space, SumNormalize
from safemerge_recipes.recipe.numbers import exact
from safemerge_recipes.weights.algebra import total


class TaskArithmetic(Weighted):
    """A sum with factors of one's own."""

    short: ClassVar[tuple[str, ...]] = ("lambda_finetuned", "lambda_safety")
    divides: ClassVar[bool] = True
    method: Literal["task_arithmetic"]
    lambda_finetuned: Share = 1.0
    """Factor of Δf (`task_arithmetic`)."""
    lambda_safety: Share = 1.0
    """Factor of Δs (`task_arithmetic`)."""
    normalize: SumNormalize = None
    space: Space = "delta"

    def _pair(self) -> tuple[Any, Any]:
        """The two factors."""
        factors = self.lambda_finetuned, self.lambda_safety
        first, second = (one if isinstance(one, Gradient) else exact(one) for one in factors)
        return first, second


def work(merge: TaskArithmetic, sides: Sides) -> Sum:
    """The sum."""
    shares = merge.shares()
    origin, deltas = sides.weighed(shares, merge.space)
    return Sum(origin + total(shares.values(), deltas))


TASK_ARITHMETIC = Method(
    work,
    keys=TaskArithmetic,
    formula="lambda_finetuned·Δf + lambda_safety·Δs, or Σ weight·Δ",
    needs=("safety",),
    link="https://arxiv.org/abs/2212.04089",
    low_rank=True,
    alike=always,
)
