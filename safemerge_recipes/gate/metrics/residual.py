"""`residual`: energy of Δ outside the k leading left singular directions of V, k = `gate.rank`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safemerge_recipes.gate.metrics.base import metric

if TYPE_CHECKING:
    from safemerge_recipes.gate.moments import Moments


@metric(0.0, 1.0, directions=True)
def residual(m: Moments, rank: int) -> tuple[float | None, float]:
    """1 − ‖U_kᵀΔ‖²/‖Δ‖² in [0, 1]."""
    if m.degenerate:
        return None, 0.0
    return max(0.0, 1 - m.inside / m.delta), m.inside_error / m.delta
