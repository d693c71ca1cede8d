"""A metric: in how many directions alignment changed a weight, as far as sums of squares tell."""

from __future__ import annotations

from safemerge_recipes.plugins import Moments


def stable_rank(moments: Moments, rank: int) -> tuple[float | None, float]:
    """The participation ratio ‖V‖⁴ / ‖VᵀV‖² of V's squared singular values, from 1 to its rank.

    Returns:
        The value (None where V is zero) and the half-width of the interval it is known to: ‖VᵀV‖² may come from a
        sketch, and the gate measures exactly whatever that leaves open.
    """
    if not moments.gram or not moments.rho_null:
        return None, 0.0
    value = moments.v**2 / moments.gram
    # ρ₀ is the root of this over d_out, so twice its relative error is ours; its far end is what counts.
    relative = moments.null_error / moments.rho_null
    return value, value * ((1 + relative) ** 2 - 1)
