"""The method's formulas written out densely in float64, straight from the papers: the oracle of the tests.

Slow and memory-hungry on purpose: VVᵀ is formed, tensors are sorted, nothing is shared with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rho(v: Tensor, delta: Tensor) -> float:
    """cos(CΔ, Δ) with C = VVᵀ/‖V‖_F formed."""
    c = v @ v.T / v.norm()
    projected = c @ delta
    return float((projected * delta).sum() / (projected.norm() * delta.norm()))


def rho_null(v: Tensor) -> float:
    """√(PR / d_out), PR = (Σσ²)² / Σσ⁴ from the singular values."""
    sigma = torch.linalg.svdvals(v)
    return math.sqrt(float((sigma**2).sum() ** 2 / (sigma**4).sum()) / v.shape[0])


def trim(x: Tensor, density: float) -> Tensor:
    """The ⌊density·n⌋ largest magnitudes, earlier elements first among equal ones."""
    flat = x.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[: math.floor(density * len(flat) + 1e-9)]] = True
    return torch.where(kept.view_as(x), x, torch.zeros_like(x))


def consensus(x: Tensor, y: Tensor, alpha: float, normalize: bool = True, scale: float = 1.0, draw: int = 1) -> Tensor:
    """TIES' election and disjoint merge, element by element as the paper's pseudocode has it.

    `draw` is the sign that wins where the vote is zero up to float32 rounding.
    """
    weights = (alpha, 1 - alpha)
    vote = weights[0] * x + weights[1] * y
    vote[vote.abs() <= 2e-7 * (weights[0] * x.abs() + weights[1] * y.abs())] = draw
    sign = torch.where(vote >= 0, 1.0, -1.0)
    total, share = torch.zeros_like(x), torch.zeros_like(x)
    for weight, side in zip(weights, (x, y), strict=True):
        agrees = (torch.sign(side) == sign).double()
        total += weight * side * agrees
        share += weight * agrees
    if normalize:
        total = torch.where(share > 0, total / share.where(share > 0, torch.ones_like(share)), total)
    return scale * total


def slerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Shoemake's formula on the flattened tensors, unnormalised; straight where they are nearly parallel."""
    cosine = float((x * y).sum() / (x.norm() * y.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * x + t * y
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * x + math.sin(t * theta) * y) / math.sin(theta)


def ulps(found: Tensor, wanted: Tensor) -> Tensor:
    """Distance in representable numbers between two tensors of one 16-bit or 32-bit float dtype."""

    def place(x: Tensor) -> Tensor:
        bits = x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()]).long()
        low = -(1 << (8 * x.element_size() - 1))
        return torch.where(bits < 0, low - bits, bits)

    return (place(found) - place(wanted)).abs()


def assert_rounded(found: Tensor, wanted: Tensor, name: str = "") -> None:
    """`found` is the float64 `wanted` after one rounding: bf16 within 1 ulp and nearly all equal, fp32 within 1e-6.

    The float32 arithmetic may tip a value over a rounding boundary, by one unit in the last place; decimal
    weights of bf16 numbers lie on such a boundary about once in a hundred times.
    """
    assert found.shape == wanted.shape, name
    if found.dtype == torch.float32:
        worst = float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        assert worst <= 1e-6, (name, worst)
        return
    distance = ulps(found, wanted.to(found.dtype))
    near_zero = (found.double() - wanted).abs() <= 1e-7 * wanted.abs().max()  # an ulp near zero means nothing
    assert bool(((distance <= 1) | near_zero).all()), (name, int(distance.max()))
    assert float((distance == 0).double().mean()) > 0.97, (name, float((distance == 0).double().mean()))


def nearer(found: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Element by element, the one of two admissible references that `found` is nearer to."""
    return torch.where((found.double() - one).abs() <= (found.double() - other).abs(), one, other)
