"""`tau`: merged is what lies below a threshold, or above it where the gate looks upwards."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.threshold import threshold

TAU = threshold(at_most=False)
