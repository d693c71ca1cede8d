"""The built-in metrics of a gate: from what was measured of a tensor to the one number that a selector looks at.

A metric is a function here and its row in `recipe/builtins`. Pure; reads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from safemerge_recipes.gate.moments import Moments
from safemerge_recipes.recipe import builtins

Metric = Callable[[Moments, int], tuple[float | None, float]]
"""(moments of a tensor or group, gate.rank) -> (value or None where undefined, half-width of its interval)."""


def rho(m: Moments, rank: int) -> tuple[float | None, float]:
    """ρ = cos(VVᵀΔ, Δ), the paper's (arXiv 2503.17239), in [0, 1]."""
    return m.rho, m.rho_error


def rho_ratio(m: Moments, rank: int) -> tuple[float | None, float]:
    """ρ/ρ₀: how many times what an update unrelated to V would show, ρ₀ ≈ √(‖V‖⁴/‖VᵀV‖²/d_out)."""
    if m.rho is None or not m.rho_null:
        return None, 0.0
    ratio = m.rho / m.rho_null
    return ratio, (m.rho_error + ratio * m.null_error) / max(m.rho_null - m.null_error, 1e-300)


def cosine(m: Moments, rank: int) -> tuple[float | None, float]:
    """cos(Δ, V) in [−1, 1]: whether fine-tuning went along with alignment or against it."""
    if m.degenerate:
        return None, 0.0
    return max(-1.0, min(1.0, m.inner / (math.sqrt(m.delta) * math.sqrt(m.v)))), 0.0


def residual(m: Moments, rank: int) -> tuple[float | None, float]:
    """1 − ‖U_kᵀΔ‖²/‖Δ‖² in [0, 1]: energy of Δ outside the k leading left singular directions of V."""
    if m.degenerate:
        return None, 0.0
    return max(0.0, 1 - m.inside / m.delta), m.inside_error / m.delta


def norm_ratio(m: Moments, rank: int) -> tuple[float | None, float]:
    """‖Δ‖/‖V‖."""
    return (None, 0.0) if m.degenerate else (math.sqrt(m.delta / m.v), 0.0)


def e_diem(m: Moments, rank: int) -> tuple[float | None, float]:
    """(d − √(2n)) / √(2n(1 − 1/π)) with d = ‖CΔ − Δ‖, C = VVᵀ/‖V‖, n elements: SPLoRA's distance, a surrogate.

    SPLoRA (arXiv 2506.18931) standardises d by its mean and variance over samples of layers, which its published
    code replaces by these values for n elements where it is given none; the order within one shape is the same.
    """
    if m.degenerate:
        return None, 0.0
    square = m.image / m.v - 2 * m.overlap / math.sqrt(m.v) + m.delta
    error = m.image_error / m.v + 2 * m.overlap_error / math.sqrt(m.v)
    d = math.sqrt(max(0.0, square))
    half = max(math.sqrt(max(0.0, square + error)) - d, d - math.sqrt(max(0.0, square - error)))
    spread = math.sqrt(2 * m.numel * (1 - 1 / math.pi))
    return (d - math.sqrt(2 * m.numel)) / spread, half / spread


METRICS: Mapping[str, Metric] = builtins.load(builtins.METRICS)
"""The built-in metrics."""
