"""`fraction`: merged is a part, from one end, of all or of each module type."""

from __future__ import annotations

import math

from safemerge_recipes.gate.selectors.rank import rank

FRACTION = rank(lambda value, members: math.ceil(value * members - 1e-9))
