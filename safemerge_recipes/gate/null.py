"""ρ₀ from random columns: how much of an update unrelated to V would lie in V's image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

NULL_PROBES = {False: 8, True: 48}
"""Random columns for ρ₀, by whether the metric looks at it."""
NULL_SAMPLES = {False: 8, True: 32}
"""How many of the random columns are samples; the others show where V's energy lies."""
NULL_QUANTILE = {8: 20.0, 32: 8.0}
"""Half-width of ρ₀'s interval in standard errors, by samples: t with 7 and 31 degrees of freedom has 15 and 6.5 beyond
1 − 1e-6; the rest is for samples that lean to one side where few directions carry V."""
DELTA_PROBES = 12
"""Random columns that tell how many directions carry a full Δ: the spread of ρ₀ is then known to about a tenth."""
ROUNDING = 1e-5
"""What float32 products may be off by, as a part of the result: the least half-width of a sketch's interval."""
RIDGE = 1e-8
"""Keeps rounding out of the solutions where V has fewer directions than there are columns."""


class Null(NamedTuple):
    """What an update unrelated to V would show, of one tensor or, added up, of a group.

    With v = ‖V‖², g = ‖VᵀV‖², d = ‖Δ‖², m = d_out: an update whose directions in the output space are random has
    E‖VᵀΔ‖² = vd/m and E‖VVᵀΔ‖² = gd/m. Given ‖Δ‖, the part of it inside V's PR = v²/g directions has a relative
    variance of (2/r)(1/PR − 1/m) where r = ‖Δ‖⁴/‖ΔᵀΔ‖² directions carry Δ (the Beta law of a random projection, all
    PR directions taken as alike).

    Attributes:
        overlap: Σ vd/m.
        image: Σ gd/m.
        least: the same where ρ₀'s interval is at its upper end.
        most: the same at its lower end.
        aa: Σ of the overlap's variances, with `ab` and `bb` for its covariance with the image and the image's own.
        ab: see `aa`.
        bb: see `aa`.
        unknown: members whose r is not known, so that the spread is not.
    """

    overlap: float
    image: float
    least: float
    most: float
    aa: float
    ab: float
    bb: float
    unknown: int

    def plus(self, other: Null) -> Null:
        """The null of both together."""
        sums: list[Any] = [one + two for one, two in zip(self, other, strict=True)]
        return Null(*sums)

    def rho(self, delta: float, image: float | None = None) -> float | None:
        """ρ₀ of a group with Σ d = `delta`: Σ(vd/m) / √(Σ(gd/m)·Σd)."""
        below = math.sqrt(self.image if image is None else image) * math.sqrt(delta)
        return min(1.0, self.overlap / below) if below else None

    def spread(self) -> float | None:
        """The standard deviation of ρ over ρ₀ among unrelated updates, to first order; None where unknown."""
        if self.unknown or not self.overlap or not self.image:
            return None
        x, y = self.overlap, self.image
        return math.sqrt(max(0.0, self.aa / x**2 - self.ab / (x * y) + self.bb / (4 * y**2)))


def null_of(v: float, gram: float, delta: float, delta_gram: float, d_out: int, error: float) -> Null:
    """The null of one tensor; see `Null`.

    Args:
        v: ‖V‖².
        gram: ‖VᵀV‖².
        delta: ‖Δ‖².
        delta_gram: ‖ΔᵀΔ‖²; 0 where it is not known.
        d_out: rows.
        error: half-width of ρ₀'s interval; one that reaches 0 leaves ‖VᵀV‖² unbounded.
    """
    if not (v and gram and delta and d_out):
        return Null(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    overlap, image, rho = v * delta / d_out, gram * delta / d_out, v / math.sqrt(gram * d_out)
    least, most = (image * (rho / (rho + by)) ** 2 if rho + by > 0 else math.inf for by in (error, -error))
    variance = 2 * (delta_gram / delta**2) * max(0.0, gram / v**2 - 1 / d_out)
    aa, ab, bb = (part * variance for part in (overlap**2, overlap * image, image**2))
    return Null(overlap, image, least, most, aa, ab, bb, int(not delta_gram))


def pair_moment(products: np.ndarray) -> float:
    """‖ΔᵀΔ‖² from (ΔX)ᵀ(ΔX), float64, of standard normal columns X: the mean square of x_iᵀΔᵀΔx_j over pairs."""
    import numpy as np

    squares, n = np.square(products), len(products)
    with np.errstate(invalid="ignore"):  # weights that are not finite are refused by their norms
        return float((squares.sum() - squares.trace()) / (n * (n - 1)))


def null_moment(gram: np.ndarray, image: np.ndarray, samples: int) -> tuple[float, float]:
    """(‖A‖_F², half-width of its interval) of A = VVᵀ, from what columns X tell of it.

    The last columns are the samples: standard normal, and independent of the others, of which A's Nyström
    approximation Â is made. ‖As‖² − ‖Âs‖² + ‖Â‖_F² is unbiased for each, and varies little where few directions
    carry V. (To leave out one column at a time from Â wastes none, but then the samples hang together, and their
    spread understates the error.)

    Args:
        gram: XᵀAX, float64.
        image: XᵀA²X, likewise.
        samples: how many columns are samples.
    """
    import numpy as np

    scale = 1 / np.sqrt(np.maximum(gram.diagonal(), 1e-300))
    gram, image = scale[:, None] * gram * scale, scale[:, None] * image * scale
    fixed = len(gram) - samples
    # ‖Â‖_F² = tr((H⁻¹K)²) for H = XᵀAX and K = XᵀA²X of the fixed columns
    seen = image[:fixed, :fixed]
    solved = np.linalg.solve(gram[:fixed, :fixed] + RIDGE * np.eye(fixed), np.hstack([seen, gram[:fixed, fixed:]]))
    reach, weights = solved[:, :fixed], solved[:, fixed:]
    left = image.diagonal()[fixed:] - np.einsum("im,ij,jm->m", weights, seen, weights)
    found = left / scale[fixed:] ** 2 + np.sum(reach * reach.T)
    total = float(found.mean())
    half = NULL_QUANTILE[samples] * float(found.std(ddof=1)) / math.sqrt(samples)
    return total, half + ROUNDING * abs(total)
