"""What is measured of a tensor: sums of squares, from which ρ and every other measure follows.

For V = W_aligned − W_base and Δ = W_finetuned − W_aligned, both `(d_out, d_in)`, the paper's gate
(arXiv 2503.17239) is ρ = cos(VVᵀΔ, Δ) = ‖VᵀΔ‖² / (‖VVᵀΔ‖·‖Δ‖). Knows nothing of how the sums are found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

Effort = Literal["sketch", "exact"]
"""How hard a measurement tries."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums of squares from which every measure of a tensor, or of a group of tensors, follows.

    They add up: the moments of a block-diagonal group are the sums of its members'.

    Attributes:
        overlap: ‖VᵀΔ‖².
        image: ‖VVᵀΔ‖².
        delta: ‖Δ‖².
        v: ‖V‖².
        gram: ‖VᵀV‖².
        rho_error: half-width of ρ's interval; 0 where ρ is exact to rounding.
        null_error: half-width of ρ₀'s interval; 0 where it is exact to rounding.
        d_out: rows of the tensor.
        inner: ⟨V, Δ⟩.
        inside: ‖U_kᵀΔ‖² for the k leading left singular directions of V; 0 unless asked for.
        inside_error: half-width of its interval.
        overlap_error: half-width of the overlap's own interval.
        image_error: half-width of the image's own interval.
        numel: elements of the tensor.
    """

    overlap: float
    image: float
    delta: float
    v: float
    gram: float
    rho_error: float = 0.0
    null_error: float = 0.0
    d_out: int = 0
    inner: float = 0.0
    inside: float = 0.0
    inside_error: float = 0.0
    overlap_error: float = 0.0
    image_error: float = 0.0
    numel: int = 0

    @property
    def degenerate(self) -> str | None:
        """What makes ρ undefined, if anything: "V is zero" or "the update is zero"."""
        return "V is zero" if self.v == 0 else "the update is zero" if self.delta == 0 else None

    @property
    def rho(self) -> float | None:
        """ρ in [0, 1]; 0 for an update orthogonal to V, None where undefined."""
        if self.degenerate:
            return None
        below = math.sqrt(self.image) * math.sqrt(self.delta)
        return min(1.0, self.overlap / below) if below else 0.0

    @property
    def rho_null(self) -> float | None:
        """ρ₀ ≈ √(PR / d_out), PR = ‖V‖⁴ / ‖VᵀV‖²: what an update unrelated to V would show."""
        return min(1.0, self.v / math.sqrt(self.gram * self.d_out)) if self.gram else None

    def __add__(self, other: Moments) -> Moments:
        total = Moments(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))
        if not total.rho_error:
            return total
        # ρ's own interval is narrower than what its parts allow, but only the parts' intervals add up.
        high = total.overlap + total.overlap_error
        low = math.sqrt(max(total.image - total.image_error, 0.0)) * math.sqrt(total.delta)
        error = min(1.0, high / low) - (total.rho or 0.0) if low else 1.0
        return replace(total, rho_error=max(error, total.rho_error))


def with_null(moments: Moments, columns: int, error: float) -> Moments:
    """The moments with ρ₀'s interval, from that of ‖VᵀV‖² and from what it can be for a V `(d_out, columns)`."""
    least = moments.v**2 / min(moments.d_out, columns)  # all directions alike; ‖V‖⁴ where there is but one
    found, low, high = (
        replace(moments, gram=min(max(moments.gram + by, least), moments.v**2)) for by in (0.0, -error, error)
    )
    null = found.rho_null or 0.0
    return replace(found, null_error=max((low.rho_null or 0.0) - null, null - (high.rho_null or 0.0)))
