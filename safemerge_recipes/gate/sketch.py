"""A sketch of ρ for two full matrices: the leading subspace of V exactly, only the rest at random.

ρ weighs directions by the square of V's spectrum, so where that decays a few directions carry nearly all of
it. With Q an orthonormal basis `(d_out, k)` of V's leading left space, M = VVᵀ, D = QᵀΔ and R = Δ − QD,

    ‖VᵀΔ‖²  = tr(DᵀQᵀMQD) + 2·tr(DᵀQᵀMR) + ‖VᵀR‖²
    ‖VVᵀΔ‖² = ‖MQD‖² + 2·⟨MQD, MR⟩ + ‖MR‖²

of which only the last term of the first line and the last two of the second are estimated (Hutchinson, as
Hutch++ does: Meyer et al. 2021, arXiv 2010.09649). Four passes over V, two over Δ, about 40·k operations an
element; where V's spectrum is flat it is as good as a plain sketch, where it decays far better.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from safemerge_recipes.gate.moments import Moments, with_null
from safemerge_recipes.gate.null import DELTA_PROBES, pair_moment
from safemerge_recipes.weights.matrix import TorchRows, inner_product, square_sum
from safemerge_recipes.weights.spectrum import normal_probes

if TYPE_CHECKING:
    import torch

RANK = 32
"""Leading directions of V taken exactly, and random vectors for the rest."""
QUANTILE = 6.5
"""Half-width of the interval in standard errors: t with 31 degrees of freedom, beyond 1 − 1e-6."""
NULL_FEW = 8
"""Random vectors for ρ₀ where the metric does not look at it ..."""
NULL_QUANTILE = 20.0
"""... and half-width of its interval in standard errors."""


def interval(fixed: tuple[float, float], samples: tuple[torch.Tensor, torch.Tensor], quantile: float) -> float:
    """Relative half-width of ρ's interval by the jackknife: ρ ∝ (f₀ + mean a) / √(f₁ + mean b).

    Args:
        fixed: (f₀, f₁), known exactly.
        samples: (a, b), float64, one entry a probe.
        quantile: half-width in standard errors.
    """
    first, second = samples
    m = len(first)
    above = fixed[0] + (first.sum() - first) / (m - 1)
    below = fixed[1] + (second.sum() - second) / (m - 1)
    if not bool((above > 0).all() and (below > 0).all()):
        return math.inf
    left_out = above.log() - below.log() / 2
    spread = math.sqrt(float(((left_out - left_out.mean()) ** 2).sum()) * (m - 1) / m)
    return math.expm1(min(quantile * spread, 50.0))


def orthonormal(x: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns of x, computed in float64."""
    import torch

    return torch.linalg.qr(x.double()).Q.to(x.dtype)


def gram_moment(rows: torch.Tensor, exact: int, quantile: float) -> tuple[float, float]:
    """(‖VᵀV‖², relative half-width of its interval) from the rows of VᵀV·[P | X].

    Args:
        rows: `(exact + m, d_in)`: the products with an orthonormal P, then with m probes orthogonal to it.
        exact: how many belong to P.
        quantile: half-width in standard errors.
    """
    samples = rows[exact:].double().square().sum(dim=1)
    total = square_sum(rows[:exact]) + float(samples.mean())
    return total, quantile * float(samples.std()) / math.sqrt(len(samples)) / total if total else 0.0


def _half_width(samples: torch.Tensor) -> float:
    """Half-width of the interval of a mean of float64 samples."""
    return QUANTILE * float(samples.std()) / math.sqrt(len(samples))


def sketched_moments(name: str, v: TorchRows, delta: TorchRows, device: str, null: bool) -> Moments:
    """The moments of V and Δ, `(d_out, d_in)`, with intervals for ρ and ρ₀. Sums of squares are float64.

    `null`: whether ρ₀ is needed with the same care as ρ.
    """
    import torch

    start = normal_probes(name + "\0range", v.columns, RANK, v.dtype, device)
    probes = normal_probes(name + "\0rest", v.columns, RANK, v.dtype, device)
    leading = torch.zeros(RANK, v.columns, dtype=v.dtype, device=device)
    thin = torch.empty(v.rows, RANK, dtype=v.dtype, device=device)  # products of a pass: new memory costs as much
    v_square = 0.0
    for rows, piece in v:  # pass 1: the leading right space of V
        leading.addmm_(torch.mm(piece, start, out=thin[rows]).T, piece)
        v_square += square_sum(piece)
    right = orthonormal(leading.T)
    few = probes if null else probes[:, :NULL_FEW]  # these are for ρ₀ alone
    outside = few - right @ (right.T @ few)

    sides = torch.cat([right, outside], dim=1)
    both = torch.empty(v.rows, sides.shape[1], dtype=v.dtype, device=device)
    image = both[:, :RANK]  # S = V·right
    gram_rows = torch.zeros(sides.shape[1], v.columns, dtype=v.dtype, device=device)
    inner = torch.zeros(RANK, v.columns, dtype=v.dtype, device=device)  # SᵀΔ
    delta_square = product = 0.0
    beside = normal_probes(name + "\0delta", v.columns, DELTA_PROBES, v.dtype, device)
    products = torch.zeros(DELTA_PROBES, DELTA_PROBES, dtype=torch.float64, device=device)
    for (rows, piece), (_, d_piece) in zip(v, delta, strict=True):  # pass 2
        found = (d_piece @ beside).double()
        products.addmm_(found.T, found)
        gram_rows.addmm_(torch.mm(piece, sides, out=both[rows]).T, piece)
        inner.addmm_(image[rows].T, d_piece)
        delta_square += square_sum(d_piece)
        product += inner_product(piece, d_piece)
    gram, gram_error = gram_moment(gram_rows, RANK, QUANTILE if null else NULL_QUANTILE)

    q64, r64 = torch.linalg.qr(image.double())
    if float(r64.diagonal().abs().min()) <= 1e-7 * float(r64.diagonal().abs().max()):
        # V has fewer directions than were asked for: a basis of its range, padded by whatever is orthogonal.
        solve = torch.linalg.pinv(r64, rtol=1e-7)
        q64 = image.double() @ solve
    else:
        solve = torch.linalg.inv(r64)
    q = q64.to(v.dtype)
    vq = (gram_rows[:RANK].double().T @ solve).to(v.dtype)  # VᵀQ `(d_in, k)`
    d = (solve.T @ inner.double()).to(v.dtype)  # QᵀΔ `(k, d_in)`
    d_probes = d @ probes

    del both, image
    mq = torch.empty(v.rows, RANK, dtype=v.dtype, device=device)  # MQ
    rest = torch.zeros(RANK, v.columns, dtype=v.dtype, device=device)  # (VᵀR·probes)ᵀ
    mq_delta = torch.zeros(RANK, v.columns, dtype=v.dtype, device=device)  # (MQ)ᵀΔ
    for (rows, piece), (_, d_piece) in zip(v, delta, strict=True):  # pass 3
        torch.mm(piece, vq, out=mq[rows])
        beyond = torch.mm(d_piece, probes, out=thin[rows]).addmm_(q[rows], d_probes, alpha=-1)
        rest.addmm_(beyond.T, piece)
        mq_delta.addmm_(mq[rows].T, d_piece)
    back = rest.T.contiguous()
    for rows, piece in v:  # pass 4: MR·probes
        torch.mm(piece, back, out=thin[rows])
    images = thin.double()
    led = mq.double() @ d_probes.double()

    mq64, d64 = mq.double(), d.double()
    cross = mq_delta.double() - mq64.T @ q64 @ d64  # QᵀMR
    overlap_fixed = float((d64 * (q64.T @ mq64 @ d64)).sum()) + 2 * float((d64 * cross).sum())
    image_fixed = float((d64 * (mq64.T @ mq64 @ d64)).sum())
    overlap_samples = rest.double().square().sum(dim=1)
    image_samples = (2 * led * images + images.square()).sum(dim=0)
    overlap = max(0.0, overlap_fixed + float(overlap_samples.mean()))
    squared = max(0.0, image_fixed + float(image_samples.mean()))
    moments = Moments(
        overlap, squared, delta_square, v_square, gram, d_out=v.rows, inner=product,
        overlap_error=_half_width(overlap_samples), image_error=_half_width(image_samples), numel=v.rows * v.columns,
        delta_gram=pair_moment(products.cpu().numpy()),
    )  # fmt: skip
    relative = interval((overlap_fixed, image_fixed), (overlap_samples, image_samples), QUANTILE)
    rho = moments.rho or 0.0
    moments = replace(moments, rho_error=min(1.0, rho * relative) if rho else 1.0)
    return with_null(moments, v.columns, gram_error * gram)
