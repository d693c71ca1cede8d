"""`at_most`: as `tau`, with the threshold itself."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.threshold import threshold

AT_MOST = threshold(at_most=True)
