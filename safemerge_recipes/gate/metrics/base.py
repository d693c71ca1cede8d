"""What every metric is: a pure function of moments, so that it serves groups of tensors and intervals too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safemerge_recipes.gate.moments import Moments

Metric = Callable[["Moments", int], tuple[float | None, float]]
"""(moments of a tensor or group, gate.rank) -> (value or None where undefined, half-width of its interval)."""


@dataclass(frozen=True)
class BuiltinMetric:
    """A metric of this package, with what a recipe and the measuring must know of it.

    Attributes:
        value: the function.
        low: the least threshold that makes sense for it.
        high: the greatest.
        directions: whether it looks inside the leading directions of V, whose number is `gate.rank`.
        null: whether it needs ρ₀ exactly where the decision is close.
    """

    value: Metric
    low: float
    high: float
    directions: bool
    null: bool

    def __call__(self, moments: Moments, rank: int) -> tuple[float | None, float]:
        """The metric's value and the half-width of its interval."""
        return self.value(moments, rank)


def metric(
    low: float = -math.inf, high: float = math.inf, *, directions: bool = False, null: bool = False
) -> Callable[[Metric], BuiltinMetric]:
    """Makes a function a metric of this package."""
    return lambda value: BuiltinMetric(value, low, high, directions, null)
