"""`norm_ratio`: ‖Δ‖/‖V‖, how far fine-tuning went beside how far alignment went."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safemerge_recipes.gate.metrics.base import metric

if TYPE_CHECKING:
    from safemerge_recipes.gate.moments import Moments


@metric(0.0)
def norm_ratio(m: Moments, rank: int) -> tuple[float | None, float]:
    """‖Δ‖/‖V‖, at least 0."""
    return (None, 0.0) if m.degenerate else (math.sqrt(m.delta / m.v), 0.0)
