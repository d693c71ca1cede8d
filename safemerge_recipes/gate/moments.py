"""What is measured of a tensor: sums of squares, from which ρ and every other measure follows.

For V = W_aligned − W_base and Δ = W_finetuned − W_aligned, both `(d_out, d_in)`, the paper's gate
(arXiv 2503.17239) is ρ = cos(VVᵀΔ, Δ) = ‖VᵀΔ‖² / (‖VVᵀΔ‖·‖Δ‖). Knows nothing of how the sums are found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from safemerge_recipes.gate.null import Null, null_of

Effort = Literal["sketch", "exact"]
"""How hard a measurement tries."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums of squares from which every measure of a tensor, or of a group of tensors, follows.

    They add up: the moments of a block-diagonal group are the sums of its members', and its ρ₀ and their spread follow
    from the members' own (`null.Null`).

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
        delta_gram: ‖ΔᵀΔ‖²; 0 where it is not known.
        members: how many tensors these are the moments of.
        v_noise: expected ‖noise‖² that quantisation put into V; 0 where no source of it is quantised.
        delta_noise: the same for Δ.
        null_overlap: of a group, as are the following, the sums of `null.Null`.
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
    delta_gram: float = 0.0
    members: int = 1
    v_noise: float = 0.0
    delta_noise: float = 0.0
    null_overlap: float = 0.0
    null_image: float = 0.0
    null_least: float = 0.0
    null_most: float = 0.0
    null_aa: float = 0.0
    null_ab: float = 0.0
    null_bb: float = 0.0
    null_unknown: int = 0

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
    def noise_share(self) -> float:
        """The expected part of quantisation noise in ‖V‖² or ‖Δ‖², whichever has more; 0 without noise."""
        parts = ((self.v_noise, self.v), (self.delta_noise, self.delta))
        return max((min(1.0, noise / square) if square else 1.0 for noise, square in parts if noise), default=0.0)

    @property
    def null(self) -> Null:
        """What an update unrelated to V would show."""
        if self.members == 1:
            return null_of(self.v, self.gram, self.delta, self.delta_gram, self.d_out, self.null_error)
        return Null(*(getattr(self, f"null_{name}") for name in Null._fields))

    @property
    def rho_null(self) -> float | None:
        """ρ₀, what an update unrelated to V would show: √(PR / d_out) of one tensor, PR = ‖V‖⁴ / ‖VᵀV‖²."""
        if self.members > 1:
            return self.null.rho(self.delta)
        return min(1.0, self.v / math.sqrt(self.gram * self.d_out)) if self.gram else None

    @property
    def rho_z(self) -> float | None:
        """(ρ − ρ₀) over the standard deviation of ρ among unrelated updates; None where that is not known or 0."""
        spread = self.null.spread()
        if self.rho is None or not self.rho_null or not spread:
            return None
        return (self.rho - self.rho_null) / (self.rho_null * spread)

    def __add__(self, other: Moments) -> Moments:
        added = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        null = self.null.plus(other.null)
        total = Moments(**added | {f"null_{name}": part for name, part in null._asdict().items()})
        # Only the parts' intervals add up, not those of ρ and ρ₀.
        ends = [null.rho(total.delta, image) for image in (null.least, null.most)]
        off = max((abs(end - (total.rho_null or 0.0)) for end in ends if end is not None), default=0.0)
        total = replace(total, null_error=off if self.null_error or other.null_error else 0.0)
        if not total.rho_error:
            return total
        # ρ's own interval is narrower than what its parts allow.
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
