"""`never`: none is merged, whatever the metric says."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.constant import constant

NEVER = constant(False)
