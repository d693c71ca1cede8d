"""`e_diem`, SPLoRA's distance (arXiv 2506.18931), a surrogate: how far CΔ lies from Δ, C = VVᵀ/‖V‖."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safemerge_recipes.gate.metrics.base import metric

if TYPE_CHECKING:
    from safemerge_recipes.gate.moments import Moments


@metric()
def e_diem(m: Moments, rank: int) -> tuple[float | None, float]:
    """(d − √(2n)) / √(2n(1 − 1/π)) with d = ‖CΔ − Δ‖ and n elements.

    SPLoRA standardises d by its mean and variance over samples of layers, which its published code replaces by
    these values for n elements where it is given none; the order within one shape is the same.
    """
    if m.degenerate:
        return None, 0.0
    square = m.image / m.v - 2 * m.overlap / math.sqrt(m.v) + m.delta
    error = m.image_error / m.v + 2 * m.overlap_error / math.sqrt(m.v)
    d = math.sqrt(max(0.0, square))
    half = max(math.sqrt(max(0.0, square + error)) - d, d - math.sqrt(max(0.0, square - error)))
    spread = math.sqrt(2 * m.numel * (1 - 1 / math.pi))
    return (d - math.sqrt(2 * m.numel)) / spread, half / spread
