"""Products of two thin factors: made smaller, or made from a dense matrix, with what is lost along the way.

Arithmetic in the dtype of the arguments. The best approximation of rank k keeps the k largest singular
values (Eckart-Young); the energy lost is the part of ‖Δ‖² in the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DENSE_SIDE = 1024
"""Matrices with a side up to this are decomposed in full; larger ones by a random range finder."""
OVERSAMPLING = 32
"""Extra directions of the range finder (arXiv 0909.4061)."""
POWER_STEPS = 4
"""Passes that sharpen its range."""


def _balanced(
    u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int, energy: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(B, A, part of `energy` lost) of the `rank` leading singular triples, both factors of the same size."""
    kept = s[:rank]
    root = kept.sqrt()
    lost = max(0.0, 1.0 - float((kept.double() ** 2).sum()) / energy) if energy else 0.0
    return u[:, :rank] * root, root[:, None] * vh[:rank], lost


def recompress(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best B'·A' of a smaller rank for B `(d_out, r)` and A `(r, d_in)`, without forming B·A.

    Returns:
        B', A' and the part of ‖B·A‖² that is lost.
    """
    import torch

    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    left, right, lost = _balanced(u, s, vh, rank, float((s.double() ** 2).sum()))
    return qb @ left, right @ qa.T, lost


def truncate(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best (or, for large matrices, very nearly best) B·A of a rank for a dense matrix.

    Returns:
        B `(d_out, rank)`, A `(rank, d_in)` and the part of ‖Δ‖² that is lost.
    """
    import torch

    rank = min(rank, *delta.shape)
    energy = float((delta.double() ** 2).sum())
    if min(delta.shape) <= max(DENSE_SIDE, rank + OVERSAMPLING):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        return _balanced(u, s, vh, rank, energy)
    seeded = torch.Generator().manual_seed(0)
    probes = torch.randn(delta.shape[1], rank + OVERSAMPLING, generator=seeded, dtype=torch.float32)
    q = torch.linalg.qr(delta @ probes.to(device=delta.device, dtype=delta.dtype)).Q
    for _ in range(POWER_STEPS):
        q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ delta, full_matrices=False)
    return _balanced(q @ u, s, vh, rank, energy)
