"""`names`: merged is what the recipe's patterns name."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.named import named

NAMES = named()
