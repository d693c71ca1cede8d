"""ρ₀ from random columns: how much of an update unrelated to V would lie in V's image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

NULL_PROBES = {False: 8, True: 48}
"""Random columns for ρ₀, by whether the metric looks at it."""
NULL_SAMPLES = {False: 8, True: 32}
"""How many of the random columns are samples; the others show where V's energy lies."""
NULL_QUANTILE = {8: 20.0, 32: 8.0}
"""Half-width of ρ₀'s interval in standard errors, by samples: t with 7 and 31 degrees of freedom has 15 and 6.5 beyond
1 − 1e-6; the rest is for samples that lean to one side where few directions carry V."""
ROUNDING = 1e-5
"""What float32 products may be off by, as a part of the result: the least half-width of a sketch's interval."""
RIDGE = 1e-8
"""Keeps rounding out of the solutions where V has fewer directions than there are columns."""


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
