"""Metrics: from what was measured of a tensor to the one number that a selector looks at. One file each."""

from __future__ import annotations

from safemerge_recipes.gate.metrics.base import BuiltinMetric, Metric
from safemerge_recipes.recipe.builtins import METRICS

__all__ = ["METRICS", "BuiltinMetric", "Metric"]
