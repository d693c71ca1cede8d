"""`cosine`: cos(Δ, V), whether fine-tuning went along with alignment or against it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safemerge_recipes.gate.metrics.base import metric

if TYPE_CHECKING:
    from safemerge_recipes.gate.moments import Moments


@metric(-1.0, 1.0)
def cosine(m: Moments, rank: int) -> tuple[float | None, float]:
    """⟨V, Δ⟩/(‖V‖·‖Δ‖) in [−1, 1]."""
    if m.degenerate:
        return None, 0.0
    return max(-1.0, min(1.0, m.inner / (math.sqrt(m.delta) * math.sqrt(m.v)))), 0.0
