"""`rho`, the paper's metric (arXiv 2503.17239): ρ = cos(VVᵀΔ, Δ)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safemerge_recipes.gate.metrics.base import metric

if TYPE_CHECKING:
    from safemerge_recipes.gate.moments import Moments


@metric(0.0, 1.0)
def rho(m: Moments, rank: int) -> tuple[float | None, float]:
    """ρ in [0, 1], with the interval that it was measured to."""
    return m.rho, m.rho_error
