"""`rho_ratio`: ρ/ρ₀, how many times what an update unrelated to V would show, ρ₀ ≈ √(‖V‖⁴/‖VᵀV‖²/d_out)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safemerge_recipes.gate.metrics.base import metric

if TYPE_CHECKING:
    from safemerge_recipes.gate.moments import Moments


@metric(0.0, null=True)
def rho_ratio(m: Moments, rank: int) -> tuple[float | None, float]:
    """ρ/ρ₀; undefined where ρ₀ is."""
    if m.rho is None or not m.rho_null:
        return None, 0.0
    ratio = m.rho / m.rho_null
    return ratio, (m.rho_error + ratio * m.null_error) / max(m.rho_null - m.null_error, 1e-300)
