"""`lowest`: merged are so many from one end, of all or of each module type."""

from __future__ import annotations

from safemerge_recipes.gate.selectors.rank import rank

LOWEST = rank(lambda value, members: int(value))
