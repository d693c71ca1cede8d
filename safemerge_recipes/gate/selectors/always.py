"""`always`: all are merged, whatever the metric says."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.constant import constant

ALWAYS = constant(True)
